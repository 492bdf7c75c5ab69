"""StepTrace: what one training step does, region by region, op by op.

Bytes are those of storages (what freeing gives back), times are seconds of the device.
An op's `position` counts the ops that the region's forward sent to the dispatcher, in order.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class OpTrace:
    """One op inside a region that produced new storage.

    Args:
        position: place in the region's op sequence, from 0.
        op: overload name, for example "aten.mm.default".
        nbytes: bytes of the new storages that the op allocated for its outputs.
        saved_nbytes: the part of `nbytes` that autograd keeps for backward in the plain step.
        flops: floating-point operations, 0 where no formula is known.
        time_s: measured time of the op.
        kind: "attention", "matmul", "random", "factory" or "other".
        placeable: whether its outputs may be stored and answered from storage.
        reason: why not, when not placeable.
        rewritten: whether a later op of the region wrote to its outputs in place.
        freed_at: position of the first op of the forward that ran without its outputs alive, where
            nothing is kept for backward; `num_ops` of the region when they outlived it; None: unknown.
    """

    position: int
    op: str
    nbytes: int
    saved_nbytes: int
    flops: int
    time_s: float
    kind: str
    placeable: bool
    reason: str = ""
    rewritten: bool = False
    freed_at: int | None = None


@dataclass(frozen=True, kw_only=True)
class RegionTrace:
    """One call of a region in the traced step.

    Args:
        name: qualified module name, with "#k" after the k-th further call in one step.
        group: regions with one `group` ran the same op sequence on the same shapes.
        input_nbytes: bytes of the tensors that enter the region and are not shared by all.
        saved_nbytes: bytes that the plain step would keep for this region's backward.
        ops: the ops that allocated storage, in order.
        num_ops: length of the whole op sequence (views and writes included).
        forward_s, recompute_s, backward_s: device times; `backward_s` excludes the recompute.
        forward_peak_bytes: device bytes above the level at the region's start, forward.
        input_saved_nbytes: the part of `input_nbytes` that the plain step keeps for the region's own
            ops, and part of `saved_nbytes`; None: unknown, then all of it counts.
        input_outside_nbytes: the part of it that autograd keeps for ops outside regions.
        input_op: position of the op of the region before that made the input; None: not one of those.
        beside_nbytes: the part of the step's `outside_standing_bytes` that came just before or with it.
        around_nbytes: what else the program holds from its forward on to the turning point (local names
            of the model's forward); 0 where that was not told.
        entry_nbytes: what was held at the start of its recompute beyond what the step's other figures
            explain (gradients on their way, an output that the loop keeps); 0 where that was not told.
        cast_nbytes: casts of weights that autocast keeps from the region's forward to the end of all.
        cached_nbytes: keys and values that the plain step keeps in a cache beyond what it saves.
        recompute_peak_bytes: device bytes above the level at the start of its recompute, while
            that ran; 0: not known, `backward_peak_bytes` is then the peak of both.
        backward_peak_bytes: above the same level, from the end of its recompute until the
            region's backward ended.
        grad_nbytes: bytes of the gradients that this region's backward completes.
        has_unseen_writer: a kernel that PyTorch's dispatcher does not see wrote to a tensor.
    """

    name: str
    group: str
    input_nbytes: int
    saved_nbytes: int
    ops: tuple[OpTrace, ...]
    num_ops: int
    forward_s: float
    recompute_s: float
    backward_s: float
    forward_peak_bytes: int
    backward_peak_bytes: int
    grad_nbytes: int = 0
    has_unseen_writer: bool = False
    input_saved_nbytes: int | None = None
    input_outside_nbytes: int = 0
    input_op: int | None = None
    beside_nbytes: int = 0
    around_nbytes: int = 0
    entry_nbytes: int = 0
    cast_nbytes: int = 0
    cached_nbytes: int = 0
    recompute_peak_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class RegionTimes:
    """Seconds of one region in a planned step, waits for transfers taken off.

    Args:
        forward_s: its forward.
        rerun_s: the recompute that the plan left.
        backward_s: its backward, from the recompute's end to the next region's begin.
    """

    forward_s: float
    rerun_s: float
    backward_s: float

    @property
    def total_s(self) -> float:
        """All three."""
        return self.forward_s + self.rerun_s + self.backward_s


@dataclass(frozen=True, kw_only=True)
class StepTrace:
    """One traced step of a model on one batch shape.

    Args:
        device: "cuda" or "cpu".
        shapes: description of the root call's tensor arguments.
        param_bytes, grad_bytes, buffer_bytes, optimizer_bytes: the model's own states.
        grad_bytes_at_start: largest gradient bytes alive at a root forward of the step
            (0 with one micro-batch and gradients set to None, `grad_bytes` when accumulating).
        resident_bytes: device bytes alive at the first root forward, states included.
        outside_saved_bytes: bytes autograd saved outside regions, parameters excluded.
        outside_standing_bytes: the part of `outside_saved_bytes` that is no region's own input and
            was saved before the last region's forward ended (the rest is the head's and gone before
            the first recompute), with what several regions take; None where it was not measured.
        outside_peak_bytes: device peak between the last region's forward and the first
            recompute, above what the other figures say of the end of the last region's forward.
        optimizer_peak_bytes: device peak during `optimizer.step()`.
        peak_bytes: device peak of the traced step, which ran in the safest placement.
        regions: in order of the forward.
        forward_s, backward_s, optimizer_s: device times of the traced step.
        num_micro_batches: root forwards with gradients in the step.
    """

    device: str
    shapes: str
    param_bytes: int
    grad_bytes: int
    buffer_bytes: int
    optimizer_bytes: int
    grad_bytes_at_start: int
    resident_bytes: int
    outside_saved_bytes: int
    outside_peak_bytes: int
    optimizer_peak_bytes: int
    peak_bytes: int
    regions: tuple[RegionTrace, ...]
    forward_s: float
    backward_s: float
    optimizer_s: float
    num_micro_batches: int = 1
    outside_standing_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> StepTrace:
        """Build from what `to_dict` returned."""
        regions = tuple(
            RegionTrace(**{**r, "ops": tuple(OpTrace(**o) for o in r["ops"])})
            for r in data["regions"]
        )
        return cls(**{**data, "regions": regions})
