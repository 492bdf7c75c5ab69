"""Correcting a trace's times by a planned step whose regions were timed.

The traced step gives bytes exactly and op times well (each op is timed by itself), but what lies
between ops in it is not the loop's own: digests, mapped memory, compiled kernels. A planned step is
the loop's own, but shows only what the plan left to do: from a region's rerun and the ops that were
answered follows what a whole recompute takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from memopt.types.plan import Plan, RegionPlan
from memopt.types.trace import RegionTimes, RegionTrace, StepTrace


def recalibrated(
    trace: StepTrace,
    plan: Plan,
    compute_s: float,
    times: Mapping[str, RegionTimes],
    num_micro_batches: int,
) -> StepTrace:
    """Return `trace` with the times that a step under `plan` showed.

    Regions of one group share the median of those that were timed. Those of a group without any
    (all of it ran untouched) share the median of their traced times, scaled as the others were.
    Where none was timed, these stay as they are as far as the step was long enough for them.

    Args:
        trace: the step as traced.
        plan: in force in the timed step.
        compute_s: seconds of the timed step, waits for transfers taken off.
        times: of its regions by name.
        num_micro_batches: how many the timed step had; the returned trace has as many.
    """
    if compute_s <= 0.0 or num_micro_batches < 1:
        return trace
    plans = {r.name: r for r in plan.regions}
    groups: dict[str, list[RegionTrace]] = {}
    for region in trace.regions:
        groups.setdefault(region.group, []).append(region)
    alike = {group: _traced_times(regions) for group, regions in groups.items()}
    regions = tuple(_retimed(r, alike[r.group]) for r in trace.regions)
    trace = replace(trace, num_micro_batches=num_micro_batches, regions=regions)
    timed = {
        group: _group_times([r for r in regions if r.name in times], plans, times)
        for group, regions in groups.items()
        if any(r.name in times for r in regions)
    }
    scale = _scale(trace, timed) if timed else _fitting(trace, plans, compute_s)
    regions = tuple(
        _retimed(r, timed.get(r.group) or _scaled(alike[r.group], scale)) for r in trace.regions
    )
    return _with_outside(replace(trace, regions=regions), plans, compute_s)


def with_micro_batches(trace: StepTrace, num_micro_batches: int) -> StepTrace:
    """Return `trace` for a step of another number of micro-batches (at least 1)."""
    ratio = num_micro_batches / trace.num_micro_batches
    return replace(
        trace,
        num_micro_batches=num_micro_batches,
        forward_s=trace.forward_s * ratio,
        backward_s=trace.backward_s * ratio,
    )


def _group_times(
    regions: Sequence[RegionTrace],
    plans: Mapping[str, RegionPlan],
    times: Mapping[str, RegionTimes],
) -> RegionTimes:
    """Return forward, whole recompute (as `rerun_s`) and backward of a group."""
    return RegionTimes(
        forward_s=median(times[r.name].forward_s for r in regions),
        rerun_s=median(
            _whole_recompute(r, plans.get(r.name), times[r.name].rerun_s) for r in regions
        ),
        backward_s=median(times[r.name].backward_s for r in regions),
    )


def _whole_recompute(region: RegionTrace, plan: RegionPlan | None, rerun_s: float) -> float:
    """Return what recomputing all of a region takes, from a rerun in which some ops were answered.

    Ops behind the last saved one are never run again. Where single op times add up to more than
    the whole (gaps between ops are in them), what was answered counts by its share.
    """
    answered, every = _answered(region, plan)
    whole = rerun_s + answered
    if whole >= every or answered >= every:
        return whole
    return min(every, rerun_s / (1.0 - answered / every))


def _answered(region: RegionTrace, plan: RegionPlan | None) -> tuple[float, float]:
    """Return the seconds of the ops that a plan answers from storage, and of all that a recompute runs."""
    last = max((op.position for op in region.ops if op.saved_nbytes > 0), default=-1)
    kept = (
        {o.position for o in plan.ops if o.placement != "recompute"} if plan is not None else set()
    )
    every = sum(op.time_s for op in region.ops if op.position <= last)
    answered = sum(op.time_s for op in region.ops if op.position <= last and op.position in kept)
    return answered, every


def _inside_s(trace: StepTrace, plans: Mapping[str, RegionPlan]) -> float:
    """Return what the regions take in one micro-batch under a plan, as the cost model counts it."""
    total = 0.0
    for region in trace.regions:
        total += region.forward_s + region.backward_s
        plan = plans.get(region.name)
        if plan is None or not plan.plain:
            answered, every = _answered(region, plan)
            shrink = min(1.0, region.recompute_s / every) if every > 0.0 else 0.0
            total += max(0.0, region.recompute_s - answered * shrink)
    return total


def _fitting(trace: StepTrace, plans: Mapping[str, RegionPlan], compute_s: float) -> float:
    """Return how much faster the regions must be than traced to fit into the timed step; at most 1."""
    inside_s = _inside_s(trace, plans) * trace.num_micro_batches
    return min(1.0, compute_s / inside_s) if inside_s > 0.0 else 1.0


def _scale(trace: StepTrace, timed: Mapping[str, RegionTimes]) -> float:
    """Return by how much the timed groups were slower than traced (below 1: faster)."""
    traced = [r for r in trace.regions if r.group in timed]
    before = sum(r.forward_s + r.recompute_s + r.backward_s for r in traced)
    return sum(timed[r.group].total_s for r in traced) / before if before > 0.0 else 1.0


def _traced_times(regions: Sequence[RegionTrace]) -> RegionTimes:
    """Return the medians of a group's traced times, which is what the cost model works with."""
    return RegionTimes(
        forward_s=median(r.forward_s for r in regions),
        rerun_s=median(r.recompute_s for r in regions),
        backward_s=median(r.backward_s for r in regions),
    )


def _scaled(times: RegionTimes, scale: float) -> RegionTimes:
    return RegionTimes(
        forward_s=times.forward_s * scale,
        rerun_s=times.rerun_s * scale,
        backward_s=times.backward_s * scale,
    )


def _retimed(region: RegionTrace, times: RegionTimes) -> RegionTrace:
    return replace(
        region,
        forward_s=times.forward_s,
        recompute_s=times.rerun_s,
        backward_s=times.backward_s,
    )


def _with_outside(trace: StepTrace, plans: Mapping[str, RegionPlan], compute_s: float) -> StepTrace:
    """Make the step's own times agree: what is not in regions is outside them, or the optimizer.

    What single regions took above their group's median (the first one's backward lasts until the
    step ends, with the embedding's and the clipping of gradients) is outside.
    """
    micro = trace.num_micro_batches
    left = compute_s - _inside_s(trace, plans) * micro
    outside_s = max(0.0, left - trace.optimizer_s)
    return replace(
        trace,
        forward_s=sum(r.forward_s for r in trace.regions) * micro + outside_s,
        backward_s=sum(r.recompute_s + r.backward_s for r in trace.regions) * micro,
        optimizer_s=min(trace.optimizer_s, max(0.0, left)),
    )
