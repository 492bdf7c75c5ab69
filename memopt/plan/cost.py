"""Cost model: what each region of a StepTrace costs under a choice of placements.

A StepTrace holds facts of one measured step; a plan is a choice per region. Everything that depends on one region
alone is worked out here, once per distinct (region, choice), as a `RegionLoad`; `simulate` then strings the loads
of a step together on a timeline. Regions that ran the same ops on the same shapes share one `RegionModel`, with the
median of their times: the first step's outliers (a first call that loads a kernel) must not decide where bytes live.

Device bytes follow from what the trace measured with everything recomputed (op by op: `inside`):

- Forward and recompute. What a plan keeps changes how long outputs last, so the peak moves; see there.
- Backward. After the recompute whatever autograd saves is there, wherever it came from, so the peak is the measured
  one; what stood on the device for it is counted as standing, and taken off.
- The gradient that enters a region's backward is alive before its recompute starts and is as large as the region's
  output, which is the next region's input.
- One storage counts once: a region's input that the region before keeps as its output, or autograd for an op outside.

Times: an op answered from storage takes its time off the recompute, unless the recompute stops before it: checkpoint
ends a recompute once the last saved tensor is back, so ops behind that one are never run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from memopt.plan.inside import Inside, own_facts
from memopt.types.errors import ConfigError
from memopt.types.hardware import Hardware
from memopt.types.plan import Placement, RegionPlan
from memopt.types.trace import RegionTrace, StepTrace

ALIGN_BYTES = (
    4096  # host and SSD areas start on pages, so that O_DIRECT and page-locking work on them
)
CUDA_SLACK = 0.03
CPU_SLACK = 0.01


def slack_of(device: str) -> float:
    """Return the share of the device budget that is left free.

    On CUDA the budget bounds what the allocator reserves. Splits of its blocks that no later request fits are
    reserved but not allocated; transformer steps under a cap show 1-3 % of it. On CPU accounted bytes are exact up to
    what the model itself does not repeat from step to step.
    """
    return CUDA_SLACK if device == "cuda" else CPU_SLACK


def usable_bytes(device_bytes: int, slack: float) -> int:
    """Return what a plan may use of a device budget of `device_bytes`."""
    return int(device_bytes * (1.0 - slack))


def aligned(nbytes: int) -> int:
    """Return the bytes that `nbytes` occupy in host or SSD areas."""
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES


@dataclass(frozen=True, slots=True)
class Transfer:
    """One tensor on its way out, `offset_s` after its region's forward began."""

    offset_s: float
    nbytes: int
    to_ssd: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """Placements of one region: `ops` has one entry per OpTrace of the region, in its order."""

    plain: bool
    input: Placement
    ops: tuple[Placement, ...]


def everything_again(num_ops: int, *, plain: bool = False) -> Choice:
    """Return the Choice that stores nothing: all recomputed, or untouched where `plain`."""
    nothing: tuple[Placement, ...] = ("recompute",)
    return Choice(plain, "device", nothing * num_ops)


@dataclass(frozen=True, slots=True)
class RegionLoad:
    """What one region asks of the step under one Choice.

    Args:
        kept_bytes: on the device from the region's forward to the end of its backward.
        input_bytes: the part of `kept_bytes` that is the region's input.
        output_bytes: the part that is the next region's input.
        lent_bytes: on the device from the region's forward to the turning point.
        forward_bytes: above the standing level while its forward runs, what it keeps included.
        backward_bytes: above the standing level (what it keeps included) while its backward runs.
        rerun_s: recompute that is left.
        out: tensors that leave, in order.
        back: (bytes, from SSD) of the tensors that are fetched, in order of need.
        host_bytes, ssd_bytes: room that its stored tensors take.
    """

    plain: bool
    kept_bytes: int
    input_bytes: int
    output_bytes: int
    lent_bytes: int
    forward_bytes: int
    backward_bytes: int
    rerun_s: float
    out: tuple[Transfer, ...]
    back: tuple[tuple[int, bool], ...]
    host_bytes: int
    ssd_bytes: int


@dataclass(frozen=True)
class RegionModel:
    """One region's facts, shared with its equals, and the loads worked out so far.

    Args:
        kind: number of the set of regions that ran the same ops on the same shapes.
        region: bytes; its own times are not used.
        forward_s, recompute_s, backward_s: medians over the kind.
        offsets_s: per op, when its output exists, from the start of the region's forward.
        gains_s: per op, what answering it from storage takes off the recompute.
        inside: what it holds op by op.
        output: index of the op whose output is the next region's input; None where it is no op's.
    """

    kind: int
    region: RegionTrace
    forward_s: float
    recompute_s: float
    backward_s: float
    offsets_s: tuple[float, ...]
    gains_s: tuple[float, ...]
    inside: Inside
    output: int | None
    loads: dict[Choice, RegionLoad]

    @property
    def saved_by_ops_bytes(self) -> int:
        """Bytes of the region's own op outputs that the plain step keeps."""
        return sum(op.saved_nbytes for op in self.region.ops)

    def load(self, choice: Choice) -> RegionLoad:
        """Return the load under `choice`."""
        found = self.loads.get(choice)
        if found is None:
            found = self._plain_load() if choice.plain else self._moved_load(choice)
            self.loads[choice] = found
        return found

    def _plain_load(self) -> RegionLoad:
        region, by_ops = self.region, self.saved_by_ops_bytes
        if region.input_saved_nbytes is None:
            # a block's first ops save its input, which was born outside and may not be in saved_nbytes
            from_input = region.input_nbytes
            others = max(0, region.saved_nbytes - by_ops - from_input)
        else:
            from_input = region.input_saved_nbytes
            others = region.saved_nbytes - by_ops - from_input
        input_bytes = max(from_input, region.input_outside_nbytes)
        return RegionLoad(
            plain=True,
            kept_bytes=by_ops + others + input_bytes,
            input_bytes=input_bytes,
            output_bytes=0 if self.output is None else self.inside.saved[self.output],
            lent_bytes=region.cached_nbytes,
            forward_bytes=others
            + region.input_nbytes
            + self.inside.forward_bytes(self.inside.saved),
            backward_bytes=max(region.backward_peak_bytes - by_ops, region.grad_nbytes)
            + region.entry_nbytes,
            rerun_s=0.0,
            out=(),
            back=(),
            host_bytes=0,
            ssd_bytes=0,
        )

    def _moved_load(self, choice: Choice) -> RegionLoad:
        region = self.region
        out, back = [], []
        fetched_input = 0
        kept = [0] * len(region.ops)
        standing, fetched = [], []
        gain = 0.0
        room = {"host": 0, "ssd": 0}
        if choice.input != "device":
            fetched_input = region.input_nbytes
            out.append(Transfer(0.0, fetched_input, choice.input == "ssd"))
            back.append((fetched_input, choice.input == "ssd"))
            room[choice.input] += aligned(fetched_input)
        for k, (op, placement) in enumerate(zip(region.ops, choice.ops, strict=True)):
            if placement == "recompute":
                continue
            gain += self.gains_s[k]
            if placement == "device":
                kept[k] = op.nbytes
                standing.append(k)
            else:
                fetched.append(k)
                out.append(Transfer(self.offsets_s[k], op.nbytes, placement == "ssd"))
                back.append((op.nbytes, placement == "ssd"))
                room[placement] += aligned(op.nbytes)
        input_bytes = max(region.input_nbytes - fetched_input, region.input_outside_nbytes)
        return RegionLoad(
            plain=False,
            kept_bytes=sum(kept) + input_bytes,
            input_bytes=input_bytes,
            output_bytes=self._handed_on(kept),
            lent_bytes=region.cast_nbytes,
            forward_bytes=region.input_nbytes + self.inside.forward_bytes(kept),
            backward_bytes=fetched_input + self._backward_bytes(standing, fetched),
            rerun_s=max(0.0, self.recompute_s - gain),
            out=tuple(out),
            back=tuple(back),
            host_bytes=room["host"],
            ssd_bytes=room["ssd"],
        )

    def _handed_on(self, kept: Sequence[int]) -> int:
        """Return what is kept of the next region's input; where an in-place op wrote to it, a copy was kept."""
        k = self.output
        return 0 if k is None or self.region.ops[k].rewritten else kept[k]

    def _backward_bytes(self, standing: Sequence[int], fetched: Sequence[int]) -> int:
        """Return the peak of recompute and backward above what stands, outputs given by index."""
        region, ops = self.region, self.region.ops
        if not region.recompute_peak_bytes:
            there = sum(ops[k].saved_nbytes for k in standing)
            more = sum(ops[k].nbytes - ops[k].saved_nbytes for k in fetched)
            peak = more + max(region.backward_peak_bytes - there, region.grad_nbytes)
        else:
            used = sum(ops[k].nbytes for k in standing if k < self.inside.num_rerun)
            peak = max(region.backward_peak_bytes - used, region.grad_nbytes)
            peak = max(peak, self.inside.recompute_bytes(standing, fetched))
        return peak + region.entry_nbytes


@dataclass(frozen=True)
class StepModel:
    """A StepTrace made ready for many simulations on one machine.

    Args:
        models: one RegionModel per region of the forward, shared within a group.
        base_bytes: on the device at every root forward, whatever the plan.
        outside_bytes: what autograd saves outside regions before the last region's forward ends, and
            `beside_bytes` per region what of that came with it (the rest stands from the begin).
        output_bytes: output of the last region, alive at the turning point.
        grad_bytes: per region, gradients that its backward creates; `outside_grad_bytes` the rest.
        staging_bytes: buffers between tensors and SSD, there only if a plan uses them; device bytes where the device
            is the CPU, host bytes elsewhere.
        outside_s: time between the last region's forward and the first backward.
    """

    trace: StepTrace
    hardware: Hardware
    models: tuple[RegionModel, ...]
    base_bytes: int
    outside_bytes: int
    beside_bytes: tuple[int, ...]
    output_bytes: int
    grad_bytes: tuple[int, ...]
    outside_grad_bytes: int
    staging_bytes: int
    outside_s: float

    @property
    def plain_s(self) -> float:
        """Time of the untouched step."""
        micro = self.outside_s + sum(m.forward_s + m.backward_s for m in self.models)
        return micro * self.trace.num_micro_batches + self.trace.optimizer_s


def assumed_hardware(device: str) -> Hardware:
    """Return rates that make transfers cost nothing noticeable, for predictions in which nothing moves."""
    return Hardware(
        device=device,
        name="any",
        d2h_bytes_per_s=1e18,
        h2d_bytes_per_s=1e18,
        source="not needed: nothing moves",
    )


def build(trace: StepTrace, hardware: Hardware, staging_bytes: int = 0) -> StepModel:
    """Return the StepModel of `trace` on `hardware` with `staging_bytes` of buffers in front of the SSD.

    Raises:
        ConfigError: trace and hardware are of different devices, or the trace has no region.
    """
    if trace.device != hardware.device:
        raise ConfigError(
            f"the trace is of device {trace.device!r} but the rates are of {hardware.device!r}"
        )
    if not trace.regions:
        raise ConfigError(
            "the trace has no region: a step that trains at least one block must be traced first"
        )
    models = _models(trace.regions)
    share = _new_gradients_share(trace)
    grads = tuple(int(r.grad_nbytes * share) for r in trace.regions)
    micro = max(1, trace.num_micro_batches)
    inside_s = sum(r.forward_s + r.recompute_s + r.backward_s for r in trace.regions)
    last = trace.regions[-1]
    return StepModel(
        trace=trace,
        hardware=hardware,
        models=models,
        base_bytes=_base_bytes(trace),
        outside_bytes=_outside_bytes(trace),
        beside_bytes=tuple(r.beside_nbytes for r in trace.regions),
        output_bytes=last.ops[-1].nbytes if last.ops else last.input_nbytes,
        grad_bytes=grads,
        outside_grad_bytes=max(0, int(trace.grad_bytes * share) - sum(grads)),
        staging_bytes=staging_bytes,
        outside_s=max(0.0, (trace.forward_s + trace.backward_s) / micro - inside_s),
    )


def _base_bytes(trace: StepTrace) -> int:
    """Return device bytes at a root forward of the fullest micro-batch of any step but the first.

    The traced step is often the first one, whose optimizer has no state yet, and its first micro-batch may have had
    no gradients: the states' own sum is a lower bound for both.
    """
    states = (
        trace.param_bytes + trace.buffer_bytes + trace.optimizer_bytes + trace.grad_bytes_at_start
    )
    return max(trace.resident_bytes, states)


def _new_gradients_share(trace: StepTrace) -> float:
    """Return the share of the gradients that a backward creates, 1 where they were None at its start."""
    if trace.grad_bytes <= 0:
        return 0.0
    return max(0.0, 1.0 - trace.grad_bytes_at_start / trace.grad_bytes)


def _outside_bytes(trace: StepTrace) -> int:
    """Return an upper bound of the outside-saved bytes that stand while regions run.

    What the head and the loss save is part of `outside_peak_bytes` and gone before the first recompute. The traced
    step never exceeded `peak_bytes`, so what stood beside its outside peak, or beside a region's backward, is bounded.
    """
    if trace.outside_standing_bytes is not None:
        return trace.outside_standing_bytes
    bound = trace.outside_saved_bytes
    if trace.peak_bytes > 0:
        # optimizer state may have come only at the end of the traced step
        above = trace.peak_bytes - (trace.resident_bytes - trace.optimizer_bytes)
        bound = min(bound, above - trace.outside_peak_bytes)
        peaks = ((r.recompute_peak_bytes, r.backward_peak_bytes) for r in trace.regions)
        bound = min(bound, above - max(map(max, peaks)))
    return max(0, bound)


def _models(regions: Sequence[RegionTrace]) -> tuple[RegionModel, ...]:
    alike: dict[tuple[object, ...], list[RegionTrace]] = {}
    keys = [_shape_key(r) for r in regions]
    for key, region in zip(keys, regions, strict=True):
        alike.setdefault(key, []).append(region)
    kinds = {key: number for number, key in enumerate(alike)}
    made: dict[tuple[object, ...], RegionModel] = {}
    found = []
    outputs = [*(r.input_op for r in regions[1:]), None]
    for key, region, output in zip(keys, regions, outputs, strict=True):
        # within a kind peaks differ (the first block's backward is followed by the embedding's), and neighbours
        which = (kinds[key], output, *own_facts(region))
        if which not in made:
            made[which] = _model(kinds[key], region, alike[key], output)
        found.append(made[which])
    return tuple(found)


def _shape_key(region: RegionTrace) -> tuple[object, ...]:
    """Return what two regions must share to be of one kind: the same ops on the same shapes."""
    ops = tuple(
        (o.position, o.op, o.nbytes, o.saved_nbytes, o.kind, o.placeable) for o in region.ops
    )
    return (region.group, region.input_nbytes, region.saved_nbytes, region.grad_nbytes, ops)


def _model(
    kind: int, region: RegionTrace, alike: Sequence[RegionTrace], output: int | None
) -> RegionModel:
    times = [median(r.ops[k].time_s for r in alike) for k in range(len(region.ops))]
    forward_s = median(r.forward_s for r in alike)
    recompute_s = median(r.recompute_s for r in alike)
    last_saved = max((op.position for op in region.ops if op.saved_nbytes > 0), default=-1)
    gains = [t * (op.position <= last_saved) for op, t in zip(region.ops, times, strict=True)]
    # op times are measured one by one, with gaps between them that the whole region does not have
    shrink = min(1.0, recompute_s / sum(gains)) if sum(gains) > 0 else 0.0
    stretch = min(1.0, forward_s / sum(times)) if sum(times) > 0 else 0.0
    offsets, clock = [], 0.0
    for t in times:
        clock += t * stretch
        offsets.append(clock)
    return RegionModel(
        kind=kind,
        region=region,
        forward_s=forward_s,
        recompute_s=recompute_s,
        backward_s=median(r.backward_s for r in alike),
        offsets_s=tuple(offsets),
        gains_s=tuple(g * shrink for g in gains),
        inside=Inside(region),
        output=next((k for k, op in enumerate(region.ops) if op.position == output), None),
        loads={},
    )


def choice_of(region: RegionTrace, plan: RegionPlan | None) -> Choice:
    """Return the Choice that a RegionPlan means for `region`; None means everything recomputed.

    Raises:
        ConfigError: the plan places an op that the region does not have or that may not be placed.
    """
    if plan is None or plan.plain:
        return everything_again(len(region.ops), plain=plan is not None)
    wanted = {op.position: op for op in plan.ops}
    placements: list[Placement] = []
    for op in region.ops:
        entry = wanted.pop(op.position, None)
        placement: Placement = "recompute" if entry is None else entry.placement
        if entry is not None and placement != "recompute":
            if entry.op != op.op:
                raise ConfigError(
                    f"{region.name}: op {op.position} is {op.op}, the plan says {entry.op}"
                )
            if not op.placeable:
                raise ConfigError(
                    f"{region.name}: {op.op} at {op.position} cannot be placed: {op.reason}"
                )
        placements.append(placement)
    stray = [p for p, op in wanted.items() if op.placement != "recompute"]
    if stray:
        raise ConfigError(
            f"{region.name}: the plan places ops at {stray}, which create no storage there"
        )
    return Choice(False, plan.input, tuple(placements))
