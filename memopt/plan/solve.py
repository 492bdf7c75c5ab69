"""`solve_greedy`: a Plan inside three byte budgets.

Around `greedy.Search.fill`, which places outputs for a fixed frame, this file searches the frames: how many of the
last regions run untouched, how many inputs leave, how wide the window is, over which regions outputs are spread. One
of these is changed at a time, as long as the step gets shorter; then single placements are improved.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from memopt.plan.cost import StepModel, build, slack_of, usable_bytes
from memopt.plan.engine_facts import MIN_MOVE_BYTES
from memopt.plan.greedy import Search
from memopt.plan.polish import polish
from memopt.plan.simulate import Settings
from memopt.plan.smallest import (
    UNBOUNDED,
    Candidate,
    Limits,
    away,
    begin,
    evaluate,
    plain_choices,
    with_inputs,
)
from memopt.types.hardware import Hardware
from memopt.types.plan import OpPlacement, Plan, RegionPlan
from memopt.types.sizes import format_bytes
from memopt.types.trace import StepTrace

MAX_SIMULATED_REGIONS = 40_000
"""What the search may simulate, in region visits: about half a second of one core, in which a step waits. On traces of
an 8-billion-parameter Llama at 16,384 and 65,536 tokens 30,000 find the plan that 120,000 find."""
WINDOW_FACTORS = (1, 2)
"""Of the largest tensor. Windows of four and eight times as much gain at most 0.4 % of a step by the model, because the
link works on while the loss is computed. What really happened on an H200: sources that had left still held 3.5 GiB when
the loss wanted 1 GiB in one piece, so that the allocator unmapped and mapped memory anew, 26 ms in every step."""
STAGING_FACTOR = 8
CLOSE = 1.4  # two windows nearer than this are one


@dataclass(frozen=True)
class Frame:
    """What is fixed while outputs are placed: the last `plain` regions, the first `inputs` inputs, and how to fill."""

    plain: int = 0
    inputs: int = 0
    window: int = -1  # index into windows_of, from its end: -2 is the largest tensor, -1 twice that
    selective: bool = True  # how `fill` spreads


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
    share = slack_of(trace.device) if slack is None else slack
    staging = UNBOUNDED if staging_bytes is None else staging_bytes
    limits = Limits(usable_bytes(device_bytes, share), host_bytes, ssd_bytes, staging)
    model = build(trace, hardware, staging_bytes or 0)
    smallest, untouched = begin(model, limits, device_bytes, share)
    if untouched:
        note = (
            f"the untouched step fits: its peak of {format_bytes(smallest.timeline.device_bytes)} is inside "
            f"the device budget of {format_bytes(device_bytes)}; nothing is moved or recomputed"
        )
        return plan_of(model, smallest, (note,))
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
            tried[frame] = None if start is None else search.fill(start, selective=frame.selective)
        return tried[frame]

    best = search.fill(smallest)
    num_windows = len(windows_of(search))
    widths = range(-num_windows, 0) if search.media else (-1,)
    starts = [
        Frame(window=w, inputs=k) for k in ((0, count) if search.media else (0,)) for w in widths
    ]
    filled = [
        (found.timeline.step_s, number)
        for number, f in enumerate(starts)
        if (found := fill(f)) is not None
    ]
    if not filled:
        return best
    frame = starts[min(filled)[1]]
    improved = True
    while improved and not search.spent():
        improved = False
        for coordinate in (windows, spreads, inputs, plains):
            for other in coordinate(frame, count, num_windows * bool(search.media)):
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


def windows(frame: Frame, count: int, num_windows: int) -> list[Frame]:
    """Return the frame with other windows."""
    return [
        replace(frame, window=w)
        for w in (frame.window - 1, frame.window + 1)
        if -num_windows <= w < 0
    ]


def spreads(frame: Frame, count: int, num_windows: int) -> list[Frame]:
    """Return the frame with the other way to spread."""
    return [replace(frame, selective=not frame.selective)] if num_windows else []


def inputs(frame: Frame, count: int, num_windows: int) -> list[Frame]:
    """Return the frame with other numbers of inputs that leave."""
    numbers = {0, count // 4, count // 2, 3 * count // 4, count} - {frame.inputs}
    return [replace(frame, inputs=k) for k in sorted(numbers)] if num_windows else []


def plains(frame: Frame, count: int, num_windows: int) -> list[Frame]:
    """Return the frame with other numbers of untouched regions at the end."""
    numbers = {0, 1, 2, frame.plain - 1, frame.plain + 1, 2 * frame.plain, count // 4} - {
        frame.plain
    }
    return [replace(frame, plain=p) for p in sorted(numbers) if 0 <= p < count]


def windows_of(search: Search) -> list[int]:
    """Return windows worth trying, ascending: sizes of tensors, none close below another, and multiples of the largest.

    A window also bounds the tensors that `fill` moves: one tensor larger than it holds as much of the device.
    """
    sizes = {item.nbytes for item in search.items} | {
        m.region.input_nbytes for m in search.model.models
    }
    largest = max(1, *sizes)
    if search.on_cpu:  # there the staging buffers are the window
        return [min(STAGING_FACTOR * largest, search.limits.staging_bytes)]
    found = [largest * factor for factor in reversed(WINDOW_FACTORS)]
    for size in sorted(sizes, reverse=True):
        if MIN_MOVE_BYTES <= size < found[-1] / CLOSE:
            found.append(size)
    return found[::-1]


def start_of(search: Search, frame: Frame) -> Candidate | None:
    """Return the frame with everything recomputed; None where that does not fit."""
    model, limits = search.model, search.limits
    count = len(model.models)
    choices = with_inputs(
        plain_choices(model, since=count - frame.plain),
        away(model, limits),
        frame.inputs,
    )
    window = windows_of(search)[frame.window]
    ahead = limits.staging_bytes if search.on_cpu else UNBOUNDED
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
    sent = sum(item.nbytes for load in loads for item in load.out)
    settings = replace(
        candidate.settings,
        window_bytes=max(1, min(candidate.settings.window_bytes, sent)),
        prefetch_bytes=max(1, min(candidate.settings.prefetch_bytes, fetched)),
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
