"""Correcting a trace: a made-up machine whose true times are known, a trace that distorts them, one timed step."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt._planning import Planner
from memopt.plan import predict
from memopt.trace.calibrate import recalibrated, with_micro_batches
from memopt.types.hardware import Hardware
from memopt.types.plan import OpPlacement, Plan, RegionPlan
from memopt.types.trace import OpTrace, RegionTimes, RegionTrace, StepTrace

MIB = 1 << 20
FORWARD_S, RECOMPUTE_S, BACKWARD_S, OUTSIDE_S, OPTIMIZER_S = 0.020, 0.016, 0.033, 0.150, 0.010
OPS = (("aten.mm.default", 0.004), ("aten.bmm.default", 0.003), ("aten.add.Tensor", 0.001))
HARDWARE = Hardware(
    device="cuda", name="made up", d2h_bytes_per_s=1e15, h2d_bytes_per_s=1e15, source="made up"
)


def region(name: str, *, group: str = "g", slow: float = 1.0) -> RegionTrace:
    ops = tuple(
        OpTrace(
            position=i, op=op, nbytes=MIB, saved_nbytes=MIB, flops=1, time_s=s, kind="matmul",
            placeable=True,
        )
        for i, (op, s) in enumerate(OPS)
    )  # fmt: skip
    return RegionTrace(
        name=name, group=group, input_nbytes=MIB, saved_nbytes=4 * MIB, ops=ops, num_ops=3,
        forward_s=FORWARD_S * slow * 1.5, recompute_s=RECOMPUTE_S * slow, backward_s=BACKWARD_S * slow,
        forward_peak_bytes=4 * MIB, backward_peak_bytes=5 * MIB, grad_nbytes=MIB,
    )  # fmt: skip


def step_trace(regions: list[RegionTrace], *, compiling_s: float, micro: int = 1) -> StepTrace:
    inside = sum(r.forward_s + r.recompute_s + r.backward_s for r in regions)
    return StepTrace(
        device="cuda", shapes="", param_bytes=MIB, grad_bytes=MIB, buffer_bytes=0, optimizer_bytes=0,
        grad_bytes_at_start=0, resident_bytes=MIB, outside_saved_bytes=0, outside_peak_bytes=0,
        optimizer_peak_bytes=0, peak_bytes=100 * MIB, regions=tuple(regions),
        forward_s=(inside + OUTSIDE_S + compiling_s) * micro, backward_s=0.0, optimizer_s=OPTIMIZER_S,
        num_micro_batches=micro,
    )  # fmt: skip


def kept(name: str, positions: set[int]) -> RegionPlan:
    ops = tuple(
        OpPlacement(position=i, op=OPS[i][0], placement="device", nbytes=MIB) for i in positions
    )
    return RegionPlan(name=name, ops=ops)


def true_times(positions: set[int]) -> RegionTimes:
    return RegionTimes(
        forward_s=FORWARD_S,
        rerun_s=RECOMPUTE_S - sum(OPS[i][1] for i in positions),
        backward_s=BACKWARD_S,
    )


def true_step_s(kept_positions: list[set[int]], micro: int = 1) -> float:
    return micro * (OUTSIDE_S + sum(true_times(p).total_s for p in kept_positions)) + OPTIMIZER_S


@pytest.mark.parametrize("micro", [1, 3])
def test_the_prediction_is_the_true_step_also_under_another_plan(micro):
    regions = [region(f"r{i}", slow=1.3) for i in range(4)]
    trace = step_trace(regions, compiling_s=2.0, micro=micro)
    first = [{0}, {0, 1}, set(), {0, 1, 2}]
    plan = Plan(regions=tuple(kept(f"r{i}", p) for i, p in enumerate(first)))
    times = {f"r{i}": true_times(p) for i, p in enumerate(first)}
    corrected = recalibrated(trace, plan, true_step_s(first, micro), times, micro)
    assert predict(corrected, plan, HARDWARE).step_s == pytest.approx(
        true_step_s(first, micro), rel=1e-6
    )
    other = [{1}, set(), {2}, {0}]
    plan = Plan(regions=tuple(kept(f"r{i}", p) for i, p in enumerate(other)))
    assert predict(corrected, plan, HARDWARE).step_s == pytest.approx(
        true_step_s(other, micro), rel=1e-6
    )


@given(st.sets(st.integers(0, 2)), st.floats(0.2, 1.0))
def test_op_times_with_gaps_are_shares_of_the_whole(positions, tightness):
    """Where op times add up to more than the whole recompute, what is answered counts by its share."""
    every = sum(s for _, s in OPS)
    whole = every * tightness
    answered = sum(OPS[i][1] for i in positions)
    plan = Plan(regions=(kept("r0", positions),))
    times = {
        "r0": RegionTimes(
            forward_s=FORWARD_S, rerun_s=whole * (1 - answered / every), backward_s=BACKWARD_S
        )
    }
    trace = step_trace([region("r0")], compiling_s=0.0)
    corrected = recalibrated(trace, plan, 1.0, times, 1)
    if answered < every:
        assert corrected.regions[0].recompute_s == pytest.approx(whole, rel=1e-6)
    else:
        assert corrected.regions[0].recompute_s == pytest.approx(every)
    rerun = times["r0"].rerun_s
    step = predict(corrected, plan, HARDWARE).step_s
    assert step == pytest.approx(1.0, rel=1e-6)
    assert rerun <= corrected.regions[0].recompute_s


def test_groups_that_ran_untouched_are_scaled_as_the_others_were():
    regions = [region("r0", slow=2.0), region("other", group="h", slow=2.0)]
    plan = Plan(regions=(kept("r0", set()), RegionPlan(name="other", plain=True)))
    trace = step_trace(regions, compiling_s=0.0)
    times = {"r0": true_times(set())}
    corrected = recalibrated(trace, plan, 1.0, times, 1)
    before = sum((regions[0].forward_s, regions[0].recompute_s, regions[0].backward_s))
    scale = true_times(set()).total_s / before
    assert corrected.regions[1].backward_s == pytest.approx(regions[1].backward_s * scale)
    assert corrected.regions[0].forward_s == FORWARD_S


def test_one_outlier_does_not_decide():
    regions = [region(f"r{i}") for i in range(5)]
    times = {f"r{i}": true_times(set()) for i in range(5)}
    times["r4"] = replace(
        times["r4"], backward_s=5.0, forward_s=3.0
    )  # the embedding's, a first kernel
    plan = Plan(regions=tuple(kept(f"r{i}", set()) for i in range(5)))
    corrected = recalibrated(step_trace(regions, compiling_s=0.0), plan, 9.0, times, 1)
    assert {(r.forward_s, r.backward_s) for r in corrected.regions} == {(FORWARD_S, BACKWARD_S)}
    assert predict(corrected, plan, HARDWARE).step_s == pytest.approx(9.0), (
        "it took time all the same"
    )


@pytest.mark.parametrize("compute_s", [0.0, -1.0])
def test_without_a_time_the_trace_stays(compute_s):
    trace = step_trace([region("r0")], compiling_s=1.0)
    assert recalibrated(trace, Plan(), compute_s, {"r0": true_times(set())}, 1) is trace


@pytest.mark.parametrize("step_s", [0.05, 1.0])
def test_where_all_ran_untouched_the_step_is_still_the_one_measured(step_s):
    regions = [region("r0"), region("r1"), region("r2", slow=1.4)]
    plan = Plan(regions=tuple(RegionPlan(name=r.name, plain=True) for r in regions))
    corrected = recalibrated(step_trace(regions, compiling_s=3.0), plan, step_s, {}, 1)
    assert predict(corrected, plan, HARDWARE).step_s == pytest.approx(step_s)
    slower = corrected.regions[0].backward_s / regions[0].backward_s
    assert slower == 1.0 if step_s == 1.0 else slower < 1.0


@pytest.mark.parametrize(("traced", "timed"), [(1, 4), (4, 1)])
def test_a_timed_step_with_more_or_fewer_micro_batches_than_the_traced(traced, timed):
    trace = step_trace([region("r0"), region("r1")], compiling_s=1.0, micro=traced)
    plan = Plan(regions=(kept("r0", {0}), kept("r1", {0})))
    times = {name: true_times({0}) for name in ("r0", "r1")}
    step_s = true_step_s([{0}, {0}], timed)
    corrected = recalibrated(trace, plan, step_s, times, timed)
    assert predict(corrected, plan, HARDWARE).step_s == pytest.approx(step_s)
    as_traced = with_micro_batches(corrected, traced)
    assert predict(as_traced, plan, HARDWARE).step_s == pytest.approx(
        true_step_s([{0}, {0}], traced)
    )


class Waits:
    """A clock that saw regions as they are, and waits."""

    num_micro_batches = 1

    def __init__(self, seconds: float, link_bytes_per_s: float | None = None) -> None:
        self.seconds = seconds
        self.rate = link_bytes_per_s

    def link_bytes_per_s(self, direction: str) -> float | None:
        return self.rate

    def waited_s(self) -> float:
        return self.seconds

    def times(self) -> dict[str, RegionTimes]:
        return {f"r{i}": true_times({0, 1, 2}) for i in range(4)}


def a_planner() -> tuple[Planner, Plan]:
    """A planner of four regions, all of whose outputs go to the host over a link of 1 GB/s."""
    link = replace(HARDWARE, d2h_bytes_per_s=1e9, h2d_bytes_per_s=1e9)
    resources: Any = SimpleNamespace(hardware=lambda: link, staging_bytes=0)
    moved = tuple(
        OpPlacement(position=i, op=op, placement="host", nbytes=MIB)
        for i, (op, _) in enumerate(OPS)
    )
    plan = Plan(
        regions=tuple(RegionPlan(name=f"r{i}", ops=moved) for i in range(4)),
        window_bytes=16 * MIB,
        prefetch_bytes=16 * MIB,
    )
    trace = step_trace([region(f"r{i}") for i in range(4)], compiling_s=0.0)
    planner = Planner(trace, plan, resources, exact=True)
    return planner, plan


def test_a_step_that_waited_by_accident_does_not_slow_the_link_for_ever():
    planner, plan = a_planner()
    hidden = planner.with_prediction(plan).predicted.exposed_s
    compute_s = true_step_s([{0, 1, 2}] * 4)
    for waited_s in (2.0, hidden):
        clock: Any = Waits(waited_s)
        planner.calibrate(plan, compute_s + waited_s, clock)
        predicted = planner.with_prediction(plan).predicted
        if waited_s == 2.0:
            assert predicted.exposed_s > 0.5, "it is believed at first"
    assert predicted.step_s == pytest.approx(compute_s + hidden, rel=0.02)


def test_the_link_is_as_fast_as_the_steps_copies_not_as_its_waits():
    planner, plan = a_planner()
    compute_s = true_step_s([{0, 1, 2}] * 4)
    first: Any = Waits(2.0, link_bytes_per_s=8e8)
    planner.calibrate(plan, compute_s + 2.0, first)  # its plan came from the trace
    assert planner._hardware.d2h_bytes_per_s == planner._hardware.h2d_bytes_per_s == 8e8
    hidden = planner.with_prediction(plan).predicted.exposed_s
    assert hidden < 0.5
    calm: Any = Waits(hidden, link_bytes_per_s=9e8)
    planner.calibrate(plan, compute_s + hidden, calm)
    assert planner._hardware.d2h_bytes_per_s == 8e8, (
        "the first step's, as that is what the plan is for"
    )
    slow: Any = Waits(2.0, link_bytes_per_s=8e8)
    planner.calibrate(plan, compute_s + 2.0, slow)  # this one's plan took its transfers for hidden
    assert planner._hardware.d2h_bytes_per_s < 8e8
    assert planner.with_prediction(plan).predicted.exposed_s > 0.5
