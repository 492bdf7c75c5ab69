"""The step in PyTorch: tiles in batches, through the rules' `torch._foreach_*` operations.

`limit` is what separates the two ways of running it. None takes one whole parameter at a time (the
reference); a number takes tiles of about that many elements, of as many parameters as fit, so that
small parameters share launches and large ones need no temporary of their own size.
Element-wise operations give the same bits either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memopt.ops.counter_rng import MASK32, mix32
from memopt.ops.rounding import store_kahan, store_stochastic
from memopt.optim.arena import Arena, Dither
from memopt.optim.bucket import Entry
from memopt.optim.parts import BasisCut, Part, Tile
from memopt.optim.rules import Both, Hyper, JointRule, StateFreeRule, StateFullRule, WholeRule
from memopt.optim.settings import Settings
from memopt.optim.sharding import total_over_shards
from memopt.optim.tensors import as_matrix

MOMENT_TAG = 0x5BD1E995  # tells the moments' random bits from the weights'
CPU_TILE, DEVICE_TILE = 1 << 18, 1 << 22


@dataclass(frozen=True, kw_only=True)
class Job:
    """One parameter's update: tensors as contiguous local tensors, `step` from 1."""

    entry: Entry
    part: Part
    offset: int
    weight: Tensor
    grad: Tensor
    step: int
    compensation: Tensor | None
    memory: dict[str, Tensor]


@dataclass(frozen=True)
class Piece:
    """One tile of a job, with the same tile of its compensation."""

    job: Job
    tile: Tile
    compensation: Tensor | None


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """What all tiles of a call share. `lr` is the group's, as a number."""

    settings: Settings
    lr: float
    full: StateFullRule
    free: StateFreeRule
    arena: Arena
    call: int

    @property
    def work_dtype(self) -> torch.dtype:
        """Arithmetic is in the weights' dtype, or float32 where the result is rounded by us.

        float16 has no eps of 1e-8 (it is 0 there) and no squares of small gradients: float32, too.
        """
        s, dtype = self.settings, self.arena.dtype
        if s.quantize is not None or s.rounding != "nearest" or dtype == torch.float16:
            return torch.promote_types(dtype, torch.float32)
        return dtype

    @property
    def whole(self) -> bool:
        """Whether a rule looks at whole tensors, so that a tile must be one."""
        return not (self.full.elementwise and self.free.elementwise)

    def key(self, entry: Entry, *, moment: bool) -> int:
        """Key of the rounding's random bits in this call."""
        tag = entry.tag ^ MOMENT_TAG if moment else entry.tag
        return tag | (mix32((self.settings.seed & MASK32) ^ (self.call & MASK32)) << 32)


def call_tag(seed: int, call: int) -> int:
    """Return the upper half of `StepContext.key`, as the kernel takes it."""
    return mix32((seed & MASK32) ^ (call & MASK32))


def _pieces(job: Job, limit: int | None, align: int) -> Iterator[Piece]:
    weight, grad = as_matrix(job.weight), as_matrix(job.grad)
    tiles = job.part.tiles(weight, grad, limit, align)
    if job.compensation is None:
        for tile in tiles:
            yield Piece(job, tile, None)
        return
    others = job.part.tiles(as_matrix(job.compensation), grad, limit, align)
    for tile, other in zip(tiles, others, strict=True):
        yield Piece(job, tile, other.weight)


def run(jobs: Sequence[Job], context: StepContext, *, limit: int | None) -> None:
    """Update all jobs' parameters."""
    batch: list[Piece] = []
    filled = 0
    for job in jobs:
        for piece in _pieces(job, None if context.whole else limit, context.arena.align):
            batch.append(piece)
            filled += piece.tile.weight.numel()
            if limit is not None and filled >= limit:
                _update(batch, context)
                batch, filled = [], 0
        if limit is None:
            _update(batch, context)
            batch, filled = [], 0
    _update(batch, context)


def _update(batch: Sequence[Piece], context: StepContext) -> None:
    # A rank without rows of a matrix takes part in the sums that rules of whole matrices need.
    batch = [p for p in batch if p.tile.weight.numel() or (context.whole and p.job.entry.shards)]
    if not batch:
        return
    dtype, s = context.work_dtype, context.settings
    weights = [_load_weight(piece, dtype) for piece in batch]
    grads = [piece.tile.grad.to(dtype) for piece in batch]
    if s.maximize:
        grads = list(torch._foreach_neg(grads))
    if s.weight_decay:
        torch._foreach_mul_(weights, 1 - context.lr * s.weight_decay)
    joint = [i for i, piece in enumerate(batch) if _is_joint(piece, context)]
    apart = [i for i in range(len(batch)) if i not in joint] if joint else range(len(batch))
    _update_apart(
        [batch[i] for i in apart], [weights[i] for i in apart], [grads[i] for i in apart], context
    )
    for i in joint:
        _update_both(batch[i], weights[i], grads[i], context)
    for piece, weight in zip(batch, weights, strict=True):
        _store_weight(piece, weight, context)


def _is_joint(piece: Piece, context: StepContext) -> bool:
    joint = isinstance(context.full, JointRule)
    return joint and piece.job.entry.selection.low_rank and piece.tile.cut.has_full


def _update_apart(
    batch: Sequence[Piece], weights: Sequence[Tensor], grads: Sequence[Tensor], context: StepContext
) -> None:
    """Update both parts with rules that do not know of each other."""
    with_state = [i for i, piece in enumerate(batch) if piece.tile.cut.has_full]
    taken = [batch[i].tile.cut.take(weights[i]) for i in with_state]
    _update_free(batch, weights, grads, context)
    _update_full([batch[i] for i in with_state], taken, [grads[i] for i in with_state], context)
    for i, full in zip(with_state, taken, strict=True):
        batch[i].tile.cut.put(weights[i], full)


def _update_both(piece: Piece, weight: Tensor, grad: Tensor, context: StepContext) -> None:
    """Let a joint rule update a whole matrix."""
    s, tile, rule = context.settings, piece.tile, context.full
    assert isinstance(rule, JointRule)
    assert isinstance(tile.cut, BasisCut)
    start = piece.job.offset + tile.slot
    moments = context.arena.load(start, start + tile.num_slots, context.work_dtype)
    shape = weight.shape[0], tile.cut.basis.shape[0]
    both = Both(
        weight=weight, grad=grad, cut=tile.cut, memory=piece.job.memory, step=piece.job.step,
        moments=[moment.view(shape) for moment in moments],
        total=total_over_shards(piece.job.entry),
    )  # fmt: skip
    rule.update_both(both, _hyper(context), context.lr * s.free_scale)
    context.arena.save(start, moments, _dither(piece, context))


def _hyper(context: StepContext) -> Hyper:
    s = context.settings
    return Hyper(lr=context.lr * s.full_scale, beta1=s.betas[0], beta2=s.betas[1], eps=s.eps)


def _dither(piece: Piece, context: StepContext) -> Dither | None:
    if context.settings.rounding != "stochastic":
        return None
    return Dither(context.key(piece.job.entry, moment=True), piece.tile.slot)


def _load_weight(piece: Piece, dtype: torch.dtype) -> Tensor:
    weight = piece.tile.weight.to(dtype)
    if piece.compensation is not None:
        weight = weight + piece.compensation.to(dtype)
    return weight


def _store_weight(piece: Piece, value: Tensor, context: StepContext) -> None:
    target = piece.tile.weight
    if piece.compensation is not None:
        store_kahan(target, piece.compensation, value)
    elif value.dtype == target.dtype:
        if value.data_ptr() != target.data_ptr():
            target.copy_(value)
    elif context.settings.rounding == "stochastic" and target.dtype == torch.bfloat16:
        key = context.key(piece.job.entry, moment=False)
        store_stochastic(target, value, key, piece.tile.element)
    else:
        target.copy_(value)


def _update_free(
    batch: Sequence[Piece], weights: Sequence[Tensor], grads: Sequence[Tensor], context: StepContext
) -> None:
    rule = context.free
    chosen = [i for i, piece in enumerate(batch) if piece.tile.cut.has_free]
    if not chosen or not context.settings.split or rule.name == "none":
        return
    seen = []
    for i in chosen:
        tile, grad = batch[i].tile, grads[i]
        overwritten = rule.elementwise and not batch[i].job.entry.selection.low_rank
        grad = grad if overwritten else tile.cut.complement(grad)
        seen.append(grad.reshape(-1) if _is_vector(batch[i], rule) else grad)
    directions = _directions(rule, seen, [batch[i] for i in chosen])
    if directions is None:
        return
    cleaned = [
        batch[i].tile.cut.clean(direction.view(grads[i].shape) if _is_vector(batch[i], rule) else direction)
        for i, direction in zip(chosen, directions, strict=True)
    ]  # fmt: skip
    scale = -(context.lr * context.settings.free_scale)
    torch._foreach_add_([weights[i] for i in chosen], cleaned, alpha=scale)


def _directions(
    rule: StateFreeRule, grads: list[Tensor], pieces: Sequence[Piece]
) -> list[Tensor] | None:
    if not isinstance(rule, WholeRule):
        return rule.direction(grads)
    return [
        rule.direction_of(grad, total_over_shards(piece.job.entry))
        for grad, piece in zip(grads, pieces, strict=True)
    ]


def _is_vector(piece: Piece, rule: StateFreeRule) -> bool:
    return piece.job.entry.vector and not rule.elementwise


def _update_full(
    batch: Sequence[Piece], taken: list[Tensor], grads: Sequence[Tensor], context: StepContext
) -> None:
    if not batch:
        return
    arena = context.arena
    starts = [piece.job.offset + piece.tile.slot for piece in batch]
    loaded = [
        arena.load(start, start + piece.tile.num_slots, context.work_dtype)
        for start, piece in zip(starts, batch, strict=True)
    ]
    shaped = [
        [value.view(full.shape) for value in values]
        for values, full in zip(loaded, taken, strict=True)
    ]
    gathered = [piece.tile.cut.gather(grad) for piece, grad in zip(batch, grads, strict=True)]
    by_moment = [list(column) for column in zip(*shaped, strict=True)]
    steps = [piece.job.step for piece in batch]
    context.full.update(taken, gathered, by_moment, steps, _hyper(context))
    for start, values, piece in zip(starts, loaded, batch, strict=True):
        arena.save(start, values, _dither(piece, context))
