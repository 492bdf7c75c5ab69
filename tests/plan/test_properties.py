"""What must hold of every plan, on drawn steps: budgets kept by an independent judge, errors that name true figures."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from traces import CPU, CUDA, MIB, steps

from memopt.plan import (
    check,
    engine_facts,
    predict,
    predict_plain,
    smallest_budget,
    solve_greedy,
    uniform_plan,
)
from memopt.plan.cost import slack_of, usable_bytes
from memopt.types.errors import BudgetError
from memopt.types.plan import OpPlacement, Plan, RegionPlan

ROOMS = st.sampled_from([0, 15 * MIB, 60 * MIB, 10_000 * MIB])
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def rates(trace):
    return CPU if trace.device == "cpu" else CUDA


def any_step():
    return st.one_of(steps("cuda"), steps("cpu"))


STAGING = 12 * MIB


def solve(trace, device_bytes, host, ssd):
    return solve_greedy(
        trace,
        rates(trace),
        device_bytes=device_bytes,
        host_bytes=host,
        ssd_bytes=ssd,
        staging_bytes=STAGING,
    )


def violations(trace, plan, device_bytes, host, ssd):
    usable = usable_bytes(device_bytes, slack_of(trace.device))
    return check(
        trace,
        plan,
        rates(trace),
        device_bytes=usable,
        host_bytes=host,
        ssd_bytes=ssd,
        staging_bytes=STAGING,
    )


@st.composite
def steps_with_plans(draw):
    trace = draw(any_step())
    media = ["device", "ssd"] + (["host"] if trace.device == "cuda" else [])
    regions = []
    for r in trace.regions:
        kind = draw(st.sampled_from(["plain", "unnamed", "placed", "placed"]))
        if kind == "unnamed":
            continue
        ops = tuple(
            OpPlacement(
                position=o.position,
                op=o.op,
                nbytes=o.nbytes,
                placement=draw(st.sampled_from(media)),
            )
            for o in r.ops
            if o.placeable and draw(st.booleans())
        )
        where = draw(st.sampled_from(media))
        regions.append(RegionPlan(name=r.name, plain=kind == "plain", input=where, ops=ops))
    sizes = st.integers(1, 100).map(lambda n: n * MIB)
    return trace, Plan(
        regions=tuple(regions),
        outside=draw(st.sampled_from(media)),
        window_bytes=draw(sizes),
        prefetch_bytes=draw(sizes),
    )


@given(steps_with_plans(), st.booleans())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_prediction_and_validator_agree_on_any_plan(case, drains):
    trace, plan = case
    with patch.object(engine_facts, "DRAINS_BEFORE_BACKWARD", drains):
        agree(trace, plan)


def agree(trace, plan):
    predicted = predict(trace, plan, rates(trace), staging_bytes=STAGING)
    exact = {
        "device_bytes": predicted.device_bytes,
        "host_bytes": predicted.host_bytes,
        "ssd_bytes": predicted.ssd_bytes,
    }
    assert check(trace, plan, rates(trace), **exact, staging_bytes=STAGING) == []
    for name, nbytes in exact.items():
        if nbytes:
            assert (
                len(
                    check(
                        trace,
                        plan,
                        rates(trace),
                        **{**exact, name: nbytes - 1},
                        staging_bytes=STAGING,
                    )
                )
                == 1
            )


@given(any_step(), ROOMS, ROOMS, st.floats(0.0, 1.2))
@quick
def test_never_over_budget_and_deterministic(trace, host, ssd, share):
    least = smallest_budget(
        trace, rates(trace), host_bytes=host, ssd_bytes=ssd, staging_bytes=STAGING
    )
    budget = int(least + share * max(0, predict_plain(trace) - least))
    plan = solve(trace, budget, host, ssd)
    assert violations(trace, plan, budget, host, ssd) == []
    assert plan.predicted == predict(trace, plan, rates(trace), staging_bytes=STAGING)
    assert plan == solve(trace, budget, host, ssd)
    assert Plan.from_dict(plan.to_dict()) == plan


@given(any_step(), ROOMS, ROOMS)
@quick
def test_smallest_budget_is_tight(trace, host, ssd):
    least = smallest_budget(
        trace, rates(trace), host_bytes=host, ssd_bytes=ssd, staging_bytes=STAGING
    )
    solve(trace, least, host, ssd)
    with pytest.raises(BudgetError, match=f"is {least // MIB} MiB"):
        solve(trace, least - MIB, host, ssd)


@given(any_step(), st.integers(-3, 3))
@quick
def test_left_alone_if_and_only_if_it_fits(trace, offset):
    peak = predict_plain(trace)
    budget = int(peak / (1 - slack_of(trace.device))) + offset * MIB
    try:
        plan = solve(trace, budget, 10_000 * MIB, 10_000 * MIB)
    except BudgetError:
        assert usable_bytes(budget, slack_of(trace.device)) < peak
        return
    fits = usable_bytes(budget, slack_of(trace.device)) >= peak
    untouched = all(r.plain for r in plan.regions) and plan.outside == "device"
    assert untouched == fits
    assert any("fits" in note for note in plan.notes) == fits


@given(any_step(), st.sampled_from(["recompute", "device", "ssd", "host"]))
@quick
def test_forced_plans_are_legal(trace, placement):
    if placement == "host" and trace.device == "cpu":
        with pytest.raises(ValueError, match="host"):
            uniform_plan(trace, placement)
        return
    plan = uniform_plan(trace, placement)
    huge = 1 << 60
    assert (
        check(trace, plan, rates(trace), device_bytes=huge, host_bytes=huge, ssd_bytes=huge) == []
    )
    assert predict(trace, plan, rates(trace), staging_bytes=STAGING).step_s > 0
