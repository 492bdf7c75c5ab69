"""`solve_greedy`: a Plan inside three byte budgets.

Around `greedy.Search.fill`, which places outputs for a fixed frame, this file searches the frames: how many of the
last regions run untouched, how many inputs leave, how wide the window is and how far fetches run ahead. One of the
four is changed at a time, as long as the step gets shorter; then single placements are improved.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from memopt.plan.cost import StepModel, build, slack_of, usable_bytes
from memopt.plan.greedy import Search
from memopt.plan.polish import polish
from memopt.plan.simulate import Settings
from memopt.plan.smallest import (
    UNBOUNDED,
    Candidate,
    Limits,
    away,
    evaluate,
    plain_choices,
    refuse,
    smallest_candidate,
    with_inputs,
)
from memopt.types.hardware import Hardware
from memopt.types.plan import OpPlacement, Plan, RegionPlan
from memopt.types.sizes import format_bytes
from memopt.types.trace import StepTrace

MAX_SIMULATED_REGIONS = (
    120_000  # about two seconds of one core: what the search may simulate, in region visits
)
WINDOWS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # in largest tensors


@dataclass(frozen=True)
class Frame:
    """What is fixed while outputs are placed: the last `plain` regions, the first `inputs` inputs, the window."""

    plain: int = 0
    inputs: int = 0
    window: int = 3  # index into WINDOWS


def solve_greedy(
    trace: StepTrace,
    hardware: Hardware,
    *,
    device_bytes: int,
    host_bytes: int,
    ssd_bytes: int,
    exact: bool = True,
    staging_bytes: int | None = None,
    slack: float | None = None,
) -> Plan:
    """Return the fastest plan found that keeps the three budgets.

    Args:
        trace: the step to plan.
        hardware: rates of the machine that will run the plan.
        device_bytes: device budget; the plan's predicted peak stays under it by `slack`.
        host_bytes: memory for memopt's host buffers; without effect where the device is the CPU.
        ssd_bytes: room for the extent files.
        exact: whole op outputs never change a bit, so both values give the same plan.
        staging_bytes: size of the buffers between tensors and SSD: part of the device's bytes where the device is the
            CPU, of the host's elsewhere, once a plan uses SSD; a larger tensor cannot go there. None: no bound known.
        slack: share of `device_bytes` left free; by default what `cost.slack_of` says of the device.

    Raises:
        BudgetError: no plan fits; the message names the smallest device budget that would work.
        ConfigError: trace and hardware do not belong together.
    """
    model = build(trace, hardware, staging_bytes or 0)
    share = slack_of(trace.device) if slack is None else slack
    staging = UNBOUNDED if staging_bytes is None else staging_bytes
    limits = Limits(usable_bytes(device_bytes, share), host_bytes, ssd_bytes, staging)
    untouched = evaluate(model, plain_choices(model), Settings(1, 1))
    if limits.hold(untouched.timeline):
        note = (
            f"the untouched step fits: its peak of {format_bytes(untouched.timeline.device_bytes)} is inside "
            f"the device budget of {format_bytes(device_bytes)}; nothing is moved or recomputed"
        )
        return plan_of(model, untouched, (note,))
    smallest = smallest_candidate(model, limits)
    if not limits.hold(smallest.timeline):
        raise refuse(model, smallest, device_bytes, share)
    search = Search(model, limits, max(400, MAX_SIMULATED_REGIONS // len(model.models)))
    best = polish(search, best_frame(search, smallest))
    notes = [] if exact else ["exact=False has no effect: whole op outputs never change a bit"]
    if trace.device == "cpu" and host_bytes > 0:
        notes.append(
            "the host budget has no effect: the device is the CPU, its memory is host memory"
        )
    return plan_of(model, best, tuple(notes))


def best_frame(search: Search, smallest: Candidate) -> Candidate:
    """Return the best filling over frames, by coordinate descent from a feasible one."""
    count = len(search.model.models)
    tried: dict[Frame, Candidate | None] = {}

    def fill(frame: Frame) -> Candidate | None:
        if frame not in tried:
            start = start_of(search, frame)
            tried[frame] = None if start is None else search.fill(start)
        return tried[frame]

    best = search.fill(smallest)
    frame: Frame | None = None
    for start in (Frame(), Frame(window=2), Frame(inputs=count), Frame(inputs=count, window=1)):
        found = fill(start)
        if found is not None:
            frame = start
            break
    if frame is None:
        return best
    improved = True
    while improved and not search.spent():
        improved = False
        for neighbours in moves(frame, count, bool(search.media)):
            for other in neighbours:
                if search.spent():
                    break
                found, now = fill(other), fill(frame)
                if found is not None and now is not None and shorter(found, now):
                    frame, improved = other, True
    found = fill(frame)
    return found if found is not None and shorter(found, best) else best


def shorter(found: Candidate, best: Candidate) -> bool:
    """Return whether `found` is faster by more than rounding."""
    return found.timeline.step_s < best.timeline.step_s * (1.0 - 1e-9)


def moves(frame: Frame, count: int, moving: bool) -> list[list[Frame]]:
    """Return the neighbours of a frame, one list per coordinate."""
    plains = sorted(
        {1, 2, 4, frame.plain + 1, frame.plain - 1, frame.plain * 2, count // 4, count // 2}
    )
    found = [[replace(frame, plain=p) for p in plains if 0 <= p < count and p != frame.plain]]
    if moving:
        widths = [w for w in (frame.window - 1, frame.window + 1) if 0 <= w < len(WINDOWS)]
        found.append([replace(frame, window=w) for w in widths])
        inputs = sorted({0, count // 4, count // 2, 3 * count // 4, count} - {frame.inputs})
        found.append([replace(frame, inputs=k) for k in inputs])
    return found


def start_of(search: Search, frame: Frame) -> Candidate | None:
    """Return the frame with everything recomputed; None where that does not fit."""
    model, limits = search.model, search.limits
    count = len(model.models)
    choices = with_inputs(
        plain_choices(model, since=count - frame.plain),
        away(model, limits),
        frame.inputs,
    )
    sizes = [item.nbytes for item in search.items] or [1]
    if frame.inputs:
        sizes.append(max(m.region.input_nbytes for m in model.models))
    window = max(1, int(WINDOWS[frame.window] * max(sizes)))
    ahead = UNBOUNDED
    if search.on_cpu:  # there the staging buffers are the window, both ways
        ahead = limits.staging_bytes
        window = min(window, limits.staging_bytes)
    return search.evaluate(choices, Settings(window, ahead))


def plan_of(model: StepModel, candidate: Candidate, notes: tuple[str, ...]) -> Plan:
    """Return the Plan of a candidate, with windows no larger than what uses them and its prediction."""
    regions = []
    for region, choice in zip(model.trace.regions, candidate.choices, strict=True):
        ops = tuple(
            OpPlacement(position=op.position, op=op.op, placement=where, nbytes=op.nbytes)
            for op, where in zip(region.ops, choice.ops, strict=True)
            if where != "recompute" and not choice.plain
        )
        regions.append(
            RegionPlan(name=region.name, plain=choice.plain, input=choice.input, ops=ops)
        )
    loads = [m.load(c) for m, c in zip(model.models, candidate.choices, strict=True)]
    fetched = max(sum(nbytes for nbytes, _ in load.back) for load in loads)
    settings = replace(
        candidate.settings, prefetch_bytes=max(1, min(candidate.settings.prefetch_bytes, fetched))
    )
    defaults = Plan()
    if not any(load.out for load in loads):
        settings = replace(
            settings, window_bytes=defaults.window_bytes, prefetch_bytes=defaults.prefetch_bytes
        )
    final = evaluate(model, candidate.choices, settings)
    assert final.timeline.device_bytes <= candidate.timeline.device_bytes
    return Plan(
        regions=tuple(regions),
        outside=settings.outside,
        window_bytes=settings.window_bytes,
        prefetch_bytes=settings.prefetch_bytes,
        predicted=final.timeline.prediction(),
        solver="greedy",
        notes=notes,
    )
