"""The greedy plan beside the best of all assignments, on steps small enough to try every one."""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from traces import CUDA, MIB, op, region, step

from memopt.plan import solve_greedy
from memopt.plan.cost import Choice, build, everything_again, usable_bytes
from memopt.plan.simulate import Settings, loads_of, simulate
from memopt.plan.smallest import Limits, smallest_candidate


def tiny_step(seed, num_regions=4, num_ops=2):
    """A step whose outputs differ in bytes, time and worth; gradients None at the start, twice of three."""
    rng = random.Random(seed)
    ops = [
        op(2 * j, rng.choice([4, 8, 12, 20]) * MIB, None, rng.choice([0.02, 0.05, 0.1, 0.4]))
        for j in range(num_ops)
    ]
    grad = rng.choice([0, 6, 15]) * MIB
    rest = rng.choice([0.02, 0.1])
    forward = sum(o.time_s for o in ops) + rest
    fields = {
        "input_nbytes": rng.choice([2, 6, 10]) * MIB,
        "forward_s": forward,
        "recompute_s": forward,
        "backward_s": 2 * forward,
        "grad_nbytes": grad,
        "backward_peak_bytes": sum(o.nbytes for o in ops) + grad + 8 * MIB,
    }
    return step(
        [region(k, ops, **fields) for k in range(num_regions)],
        outside_peak_bytes=rng.choice([2, 30]) * MIB,
    )


def all_choices(num_ops, media):
    ops = itertools.product(("recompute", *media), repeat=num_ops)
    placed = [Choice(False, where, one) for where, one in itertools.product(media, ops)]
    return [everything_again(num_ops, plain=True), *placed]


def best_of_all(trace, limits, windows):
    """Every assignment, those with the least recompute first: what is left cannot be better than its recompute."""
    model = build(trace, CUDA)
    choices = all_choices(len(trace.regions[0].ops), ("device", "host"))
    rerun = {c: model.models[0].load(c).rerun_s for c in choices}
    combinations = itertools.product(choices, repeat=len(trace.regions))
    best = float("inf")
    for combination in sorted(combinations, key=lambda cs: sum(rerun[c] for c in cs)):
        if model.plain_s + sum(rerun[c] for c in combination) >= best - 1e-9:
            break
        loads = loads_of(model, combination)
        for window in windows:
            got = simulate(model, loads, Settings(window, 1 << 60))
            if limits.hold(got):
                best = min(best, got.step_s)
    return best


def budget_between(trace, host_bytes, share):
    model = build(trace, CUDA)
    least = smallest_candidate(model, Limits(1 << 62, host_bytes, 0)).timeline.device_bytes
    plain = [everything_again(len(r.ops), plain=True) for r in trace.regions]
    most = simulate(model, loads_of(model, plain), Settings(1, 1)).device_bytes
    return int((least + share * (most - least)) / 0.97) + 1


def gap_of(seed):
    """Return (greedy - best) / best of step times, and the same relative to all that can be lost."""
    trace = tiny_step(seed, num_regions=3)
    rng = random.Random(1000 + seed)
    host = rng.choice([0, 20, 1000]) * MIB
    device = budget_between(trace, host, rng.choice([0.1, 0.3, 0.5, 0.8]))
    plan = solve_greedy(trace, CUDA, device_bytes=device, host_bytes=host, ssd_bytes=0)
    limits = Limits(usable_bytes(device, 0.03), host, 0)
    largest = max(o.nbytes for r in trace.regions for o in r.ops)
    windows = sorted({plan.window_bytes, largest // 2, largest, 2 * largest, 4 * largest})
    best = best_of_all(trace, limits, windows)
    return plan.predicted.step_s / best - 1.0


def test_greedy_is_near_the_best_of_all_assignments(capsys):
    gaps = [gap_of(seed) for seed in range(12)]
    with capsys.disabled():
        print(
            f"\ngreedy over best of all assignments: mean {sum(gaps) / len(gaps):.2%}, worst {max(gaps):.2%}"
        )
    assert max(gaps) <= 0.05
    assert sum(gaps) / len(gaps) <= 0.01


if __name__ == "__main__":
    for seed in range(int(sys.argv[1]), int(sys.argv[2])):
        print(seed, f"{gap_of(seed):.3%}", flush=True)
