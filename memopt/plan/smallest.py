"""The smallest device budget that some plan keeps, and the plan that does.

Everything is recomputed and only region inputs stand, so one question is left: which inputs stay on the device. An
input that leaves is a standing byte less for every later phase, but what is on its way out and what comes back early
holds device bytes too. The earlier a region, the more phases its input stands in: so the candidates send the inputs
of the first k regions away, k from 0 to all, into host memory as far as it goes and onto SSD after that. The
untouched step is a candidate too: with one region it can be the smallest.

`smallest_budget` and the solver use the same candidates, so a budget that the one names the other meets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from memopt.plan.cost import (
    Choice,
    StepModel,
    aligned,
    build,
    everything_again,
    slack_of,
    usable_bytes,
)
from memopt.plan.engine_facts import MIN_MOVE_BYTES
from memopt.plan.simulate import TERMS, Settings, Timeline, loads_of, simulate
from memopt.types.errors import BudgetError
from memopt.types.hardware import Hardware
from memopt.types.plan import Placement
from memopt.types.sizes import format_bytes
from memopt.types.trace import StepTrace

MIB = 1 << 20
UNBOUNDED = 1 << 62


@dataclass(frozen=True)
class Limits:
    """What a plan may use: `device_bytes` with the slack already taken off.

    `staging_bytes` is the size of the buffers between tensors and SSD: no larger tensor can go there.
    """

    device_bytes: int
    host_bytes: int
    ssd_bytes: int
    staging_bytes: int = UNBOUNDED

    def hold(self, timeline: Timeline) -> bool:
        """Return whether a simulated step stays inside all three."""
        return (
            timeline.device_bytes <= self.device_bytes
            and timeline.host_bytes <= self.host_bytes
            and timeline.ssd_bytes <= self.ssd_bytes
        )


@dataclass(frozen=True)
class Candidate:
    """A complete assignment with what it takes."""

    choices: tuple[Choice, ...]
    settings: Settings
    timeline: Timeline


def evaluate(model: StepModel, choices: Sequence[Choice], settings: Settings) -> Candidate:
    """Return the Candidate of these choices."""
    return Candidate(tuple(choices), settings, simulate(model, loads_of(model, choices), settings))


def plain_choices(model: StepModel, since: int = 0) -> list[Choice]:
    """Return everything recomputed before region `since` and plain from there on."""
    return [
        everything_again(len(region.region.ops), plain=k >= since)
        for k, region in enumerate(model.models)
    ]


def away(model: StepModel, limits: Limits) -> list[Placement]:
    """Return where each input would leave to, the first regions first; "device" where no room is left."""
    hardware = model.hardware
    left = {
        "host": 0 if hardware.device == "cpu" else limits.host_bytes,
        "ssd": limits.ssd_bytes if hardware.ssd_write_bytes_per_s > 0 else 0,
    }
    placements: list[Placement] = []
    for region in model.models:
        nbytes = region.region.input_nbytes
        size = aligned(nbytes)
        chosen: Placement = "device"
        if nbytes >= MIN_MOVE_BYTES:
            if size <= left["host"]:
                chosen = "host"
            elif size <= left["ssd"] and nbytes <= limits.staging_bytes:
                chosen = "ssd"
        if chosen != "device":
            left[chosen] -= size
        placements.append(chosen)
    return placements


def with_inputs(choices: Sequence[Choice], inputs: Sequence[Placement], count: int) -> list[Choice]:
    """Return `choices` with the inputs of the first `count` regions that are not plain where `inputs` says."""
    return [
        Choice(False, inputs[k], c.ops) if k < count and not c.plain else c
        for k, c in enumerate(choices)
    ]


def smallest_candidates(model: StepModel, limits: Limits) -> Iterator[Candidate]:
    """Yield the candidates for the smallest device peak that stay inside host and SSD budgets."""
    limits = replace(limits, device_bytes=UNBOUNDED)
    inputs = away(model, limits)
    largest = max(1, *(r.region.input_nbytes for r in model.models))
    recompute = plain_choices(model, since=len(model.models))
    yield evaluate(model, plain_choices(model), Settings(largest, largest))
    outsides: list[Placement] = ["device"]
    if model.outside_bytes:
        outsides += ["ssd"] if model.hardware.device == "cpu" else ["host", "ssd"]
    for outside in outsides:
        if outside == "ssd" and model.hardware.ssd_write_bytes_per_s <= 0:
            continue
        for count in range(len(recompute) + 1):
            if count and inputs[count - 1] == "device":
                continue
            candidate = evaluate(
                model, with_inputs(recompute, inputs, count), Settings(largest, largest, outside)
            )
            if limits.hold(candidate.timeline):
                yield candidate


def smallest_candidate(model: StepModel, limits: Limits) -> Candidate:
    """Return the candidate with the smallest device peak; the faster one, then the first, of equals."""
    return min(
        smallest_candidates(model, limits),
        key=lambda c: (c.timeline.device_bytes, c.timeline.step_s),
    )


def budget_for(peak_bytes: int, slack: float) -> int:
    """Return the smallest whole number of MiB of which a plan with this peak is allowed."""
    mib = max(1, int(peak_bytes / (1.0 - slack)) // MIB - 1)
    while usable_bytes(mib * MIB, slack) < peak_bytes:
        mib += 1
    return mib * MIB


def smallest_budget(
    trace: StepTrace,
    hardware: Hardware,
    *,
    host_bytes: int = 0,
    ssd_bytes: int = 0,
    staging_bytes: int | None = None,
    slack: float | None = None,
) -> int:
    """Return the smallest device budget, in bytes and whole MiB, that `solve_greedy` accepts.

    Args:
        trace: the step.
        hardware: the machine's rates.
        host_bytes: host memory that plans may use.
        ssd_bytes: SSD room that plans may use.
        staging_bytes: size of the buffers in front of the SSD; None where nothing bounds them.
        slack: share of the device budget left free; by default what `slack_of` says of the device.
    """
    model = build(trace, hardware, staging_bytes or 0)
    staging = UNBOUNDED if staging_bytes is None else staging_bytes
    found = smallest_candidate(model, Limits(UNBOUNDED, host_bytes, ssd_bytes, staging))
    share = slack_of(trace.device) if slack is None else slack
    return budget_for(found.timeline.device_bytes, share)


def check_budget(
    trace: StepTrace,
    hardware: Hardware,
    *,
    device_bytes: int,
    host_bytes: int,
    ssd_bytes: int,
    staging_bytes: int | None = None,
) -> bool:
    """Return whether the step fits as it is; else `solve_greedy` finds a plan. It does not look for a fast one.

    Args:
        trace: the step, complete up to the optimizer's.
        hardware: only which ways off the device there are; bytes do not depend on their rates.
        device_bytes: as `solve_greedy` takes it; the other three as well.
        host_bytes: memory for host buffers.
        ssd_bytes: room on SSD.
        staging_bytes: buffers in front of it.

    Raises:
        BudgetError: no plan fits; the message names the smallest device budget that would work.
        ConfigError: trace and hardware do not belong together.
    """
    slack = slack_of(trace.device)
    staging = UNBOUNDED if staging_bytes is None else staging_bytes
    limits = Limits(usable_bytes(device_bytes, slack), host_bytes, ssd_bytes, staging)
    return begin(build(trace, hardware, staging_bytes or 0), limits, device_bytes, slack)[1]


def begin(
    model: StepModel, limits: Limits, device_bytes: int, slack: float
) -> tuple[Candidate, bool]:
    """Return the untouched step and True where it fits, else what takes the least device memory and False.

    Raises:
        BudgetError: not even that fits.
    """
    untouched = evaluate(model, plain_choices(model), Settings(1, 1))
    if limits.hold(untouched.timeline):
        return untouched, True
    smallest = smallest_candidate(model, limits)
    if not limits.hold(smallest.timeline):
        raise refuse(model, smallest, device_bytes, slack)
    return smallest, False


def refuse(model: StepModel, candidate: Candidate, device_bytes: int, slack: float) -> BudgetError:
    """Return the error that names the smallest budget and what it consists of."""
    timeline = candidate.timeline
    worst = timeline.levels.index(timeline.device_bytes)
    parts = [
        f"{name} {format_bytes(nbytes)}"
        for name, nbytes in zip(TERMS, timeline.terms[worst], strict=True)
        if nbytes
    ]
    needed = budget_for(timeline.device_bytes, slack)
    return BudgetError(
        f"a device budget of {format_bytes(device_bytes)} cannot be met: the smallest that works is "
        f"{needed // MIB} MiB ({needed} bytes), of which {slack:.0%} stays free for fragmentation. "
        f"Its peak of {format_bytes(timeline.device_bytes)} is at {phase_name(model, worst)}: {', '.join(parts)} "
        f"(parameters {format_bytes(model.trace.param_bytes)}, gradients {format_bytes(model.trace.grad_bytes)}, "
        f"optimizer state {format_bytes(model.trace.optimizer_bytes)}). "
        f"{advice(model.trace.device)}"
    )


def advice(device: str) -> str:
    """Return what to do where no plan fits; on a CPU host memory is the device."""
    place = "an SSD directory" if device == "cpu" else "host memory or SSD"
    return f"Raise the device budget, make the batch smaller, or give {place} if there is none yet."


def phase_name(model: StepModel, index: int) -> str:
    """Return the words for a phase of a Timeline's levels."""
    regions = model.trace.regions
    count = len(regions)
    if index < count:
        return f"the forward of {regions[index].name}"
    if index == count:
        return "the turning point between forward and backward"
    if index <= 2 * count:
        return f"the backward of {regions[2 * count - index].name}"
    return "the end of the backward" if index == 2 * count + 1 else "the optimizer's step"
