"""Llama-3.1-8B steps from arithmetic: what the plan reaches, certified by a linear lower bound; time of the solver."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from llama import GIB, H200, Shape, llama

from memopt.plan import (
    check,
    engine_facts,
    predict,
    predict_plain,
    smallest_budget,
    solve_greedy,
    uniform_plan,
)
from memopt.plan.cost import CUDA_SLACK, build, usable_bytes

HOST = 512 * GIB

# tokens, device GiB, gradients exist at the start, engine drains, limits: of plain, of checkpointing, over the bound
CASES = [
    (16_384, 39, False, False, 1.10, None, 0.02),
    (16_384, 39, True, False, 1.10, None, 0.03),
    (65_536, 61, False, False, None, 0.86, 0.01),
    (65_536, 48, False, False, None, 0.86, 0.05),
    pytest.param(16_384, 36, False, False, 1.10, None, 0.03, marks=pytest.mark.slow),
    pytest.param(65_536, 61, True, False, None, 0.86, 0.01, marks=pytest.mark.slow),
    pytest.param(16_384, 39, False, True, 1.10, None, 0.01, marks=pytest.mark.slow),
    pytest.param(16_384, 39, True, True, 1.10, None, 0.02, marks=pytest.mark.slow),
    pytest.param(65_536, 48, False, True, None, 0.86, 0.01, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("tokens", "gib", "held", "drains", "of_plain", "of_full", "gap"), CASES)
def test_near_the_least_possible(
    tokens, gib, held, drains, of_plain, of_full, gap, monkeypatch, capsys
):
    pulp = pytest.importorskip("pulp")
    pytest.importorskip("highspy")
    del pulp
    from lower_bound import lower_bound_s

    monkeypatch.setattr(engine_facts, "DRAINS_BEFORE_BACKWARD", drains)
    trace = llama(Shape(tokens=tokens), accumulate=held)
    plan = solve_greedy(trace, H200, device_bytes=gib * GIB, host_bytes=HOST, ssd_bytes=0)
    usable = usable_bytes(gib * GIB, CUDA_SLACK)
    assert check(trace, plan, H200, device_bytes=usable, host_bytes=HOST, ssd_bytes=0) == []
    least = lower_bound_s(trace, H200, usable_device_bytes=usable, host_bytes=HOST)
    plain = build(trace, H200).plain_s
    full = predict(trace, uniform_plan(trace, "recompute"), H200).step_s
    step_s = plan.predicted.step_s
    with capsys.disabled():
        print(
            f"\n{tokens} tokens, {gib} GiB, gradients {'held' if held else 'None'} at the start, drained {drains}: "
            f"{step_s / plain:.4f} x plain, {step_s / full:.4f} x checkpointing, "
            f"{step_s / least - 1:.2%} above the bound ({least / plain:.4f} x plain)"
        )
    assert step_s >= least * (1 - 1e-6)
    assert step_s <= least * (1 + gap)
    if of_plain:
        assert step_s <= of_plain * plain
    if of_full:
        assert step_s <= of_full * full


def test_more_device_memory_is_never_slower_beyond_rounding():
    trace = llama(Shape(tokens=16_384, layers=8))
    least = smallest_budget(trace, H200, host_bytes=HOST)
    most = int(predict_plain(trace) / 0.97) + 1
    budgets = [least + (most - least) * k // 5 for k in range(6)]
    steps = [
        solve_greedy(trace, H200, device_bytes=b, host_bytes=HOST, ssd_bytes=0).predicted.step_s
        for b in budgets
    ]
    assert steps[-1] == pytest.approx(build(trace, H200).plain_s)
    for k, step_s in enumerate(steps):
        assert (
            step_s <= min(steps[: k + 1]) * 1.01
        )  # greedy: a larger budget may end in another local best
    assert steps[-1] < steps[0]


def test_host_and_ssd_are_used_and_bounded():
    trace = llama(Shape(tokens=16_384, layers=6))
    device = smallest_budget(trace, H200, host_bytes=HOST) + GIB
    steps = []
    for host, ssd in ((0, 0), (0, 50 * GIB), (2 * GIB, 0), (2 * GIB, 50 * GIB), (HOST, 0)):
        try:
            plan = solve_greedy(
                trace, H200, device_bytes=device, host_bytes=host, ssd_bytes=ssd, staging_bytes=GIB
            )
        except Exception:
            assert host == 0
            continue
        got = plan.predicted
        assert got.host_bytes <= host
        assert got.ssd_bytes <= ssd
        if host:
            assert got.host_bytes > host // 2 or host == HOST
        steps.append(got.step_s)
    assert steps == sorted(steps, reverse=True)


def test_solver_time():
    """80 regions of 14 placeable outputs in about two seconds of one core; twice that fails."""
    trace = llama(Shape(tokens=8192, layers=80, h=2048, ffn=7168))
    least = smallest_budget(trace, H200, host_bytes=HOST)
    budget = least + (predict_plain(trace) - least) // 3
    begin = time.process_time()
    solve_greedy(trace, H200, device_bytes=budget, host_bytes=HOST, ssd_bytes=0)
    assert time.process_time() - begin < 6.0
