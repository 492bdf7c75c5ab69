"""The fused FRUGAL step: schema, reference, and the tables both read.

`csrc/cuda/launchers.h` describes the tables ("the step's tables"); this file is the same operator in
PyTorch, element index by element index, in float32. It is what the operator does on a CPU, what
tests compare tables and kernels with, and the definition of the op:

    for every segment: every element has a position in the arena (the state-full rule) or none (the
    state-free rule); w <- w + (update - decay * w), rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor

from memopt.ops import frugal_draw as draw
from memopt.ops import native
from memopt.ops import quantize as q8
from memopt.ops.counter_rng import MASK32, mix32, random_bits
from memopt.ops.rounding import stochastic_bits
from memopt.ops.signs import sign

MAX_TENSORS = 640
CHUNK = 16384
FIELDS = 12
MOMENT_TAG = 0x5BD1E995
SCHEMA = (
    "frugal_step(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] state, "
    "Tensor(c!)[] compensations, Tensor segments, Tensor chunks, Tensor? index, "
    "float[] step_sizes, float[] denom_scales, float[] numbers, int[] choices, "
    "Tensor? scalars) -> ()"
)
CLOCK_SCHEMA = (
    "frugal_clock(Tensor lr, Tensor(a!) steps, Tensor(b!) calls, Tensor(c!) scalars, "
    "float[] numbers, int[] choices) -> ()"
)


class Kind(IntEnum):
    """What a segment's elements are."""

    FREE = 0
    FULL = 1
    COLUMNS = 2
    ROWS = 3
    STRATA = 4


class Field(IntEnum):
    """Columns of the segment table; the meaning of A, B, KEY and OFFSET depends on the kind."""

    TENSOR = 0
    KIND = 1
    START = 2
    SIZE = 3
    STATE = 4
    FIRST_CHUNK = 5
    ORIGIN = 6
    TAG = 7
    A = 8
    B = 9
    KEY = 10
    OFFSET = 11


class Rounding(IntEnum):
    """How results are stored."""

    NEAREST = 0
    STOCHASTIC = 1
    KAHAN = 2


_library: list[torch.library.Library] = []


@lru_cache(maxsize=1)
def register() -> None:
    """Load the native library, or declare its operators; add the CPU reference and the fakes."""
    native.cuda_status()
    fragment = torch.library.Library("memopt", "FRAGMENT")
    _library.append(fragment)  # a Library that is collected takes its registrations with it
    for schema in (SCHEMA, CLOCK_SCHEMA, draw.SCHEMA):
        if not native.has_operator(schema.split("(")[0]):
            fragment.define(schema)
    fragment.impl("frugal_step", frugal_step_reference, "CPU")
    fragment.impl("frugal_clock", frugal_clock_reference, "CPU")
    fragment.impl("frugal_draw", draw.frugal_draw_reference, "CPU")
    for name in native.OPERATORS:
        torch.library.register_fake(f"memopt::{name}", lambda *_: None, lib=fragment)


def slots_of(segment: Sequence[int], index: Tensor | None, device: torch.device) -> Tensor:
    """Return the arena position of every element of a segment, -1 where it has no state."""
    f = dict(zip(Field, segment, strict=True))
    element = torch.arange(f[Field.START], f[Field.START] + f[Field.SIZE], device=device)
    if f[Field.KIND] == Kind.FREE:
        return torch.full_like(element, -1)
    if f[Field.KIND] == Kind.FULL:
        return element - f[Field.START] + f[Field.STATE]
    if f[Field.KIND] == Kind.STRATA:
        return _strata_slots(f, element)
    assert index is not None
    row, column = element // f[Field.A], element % f[Field.A]
    if f[Field.KIND] == Kind.ROWS:
        slot = index[f[Field.KEY] + row].long()
        return torch.where(slot < 0, slot, f[Field.STATE] + slot * f[Field.A] + column)
    word = f[Field.KEY] + 2 * (column // 32)
    mask = index[word].long().bitwise_and(0xFFFFFFFF)
    bits = torch.arange(32, device=device)
    before = (mask.unsqueeze(1).bitwise_right_shift(bits) & 1) * (bits < (column % 32).unsqueeze(1))
    slot = index[word + 1].long() + before.sum(dim=1)
    position = f[Field.STATE] + row * f[Field.B] + slot
    chosen = mask.bitwise_right_shift(column % 32) & 1
    return torch.where(chosen == 1, position, torch.full_like(position, -1))


def _strata_slots(f: dict[Field, int], element: Tensor) -> Tensor:
    size, count, offset = f[Field.A], f[Field.B], f[Field.OFFSET]
    stratum = ((element + 1) * count - 1 - offset).div(size, rounding_mode="floor").clamp_min(0)

    def begin(j: Tensor) -> Tensor:
        edge = (j * size + offset).div(count, rounding_mode="floor")
        edge = torch.where(j == 0, torch.zeros_like(edge), edge)
        return torch.where(j == count, torch.full_like(edge, size), edge)

    first = begin(stratum)
    length = begin(stratum + 1) - first
    key = f[Field.KEY] & (2**64 - 1)
    pick = first + (random_bits(key, stratum) * length).bitwise_right_shift(32)
    return torch.where(pick == element, f[Field.STATE] + stratum, torch.full_like(stratum, -1))


def _full_update(
    g: Tensor,
    moments: list[Tensor],
    rule: int,
    step_size: float,
    denom_scale: float,
    numbers: Sequence[float],
) -> Tensor:
    _, _, beta1_rest, beta2_rest, eps = numbers
    if rule == 0:
        moments[0] += beta1_rest * (g - moments[0])
        moments[1] += beta2_rest * (g * g - moments[1])
        return -step_size * (moments[0] / (moments[1].sqrt() * denom_scale + eps))
    if rule == 1:
        update = -step_size * sign(moments[0] + beta1_rest * (g - moments[0]))
        moments[0] += beta2_rest * (g - moments[0])
        return update
    moments[0] *= 1.0 - beta1_rest
    moments[0] += g
    return -step_size * moments[0]


def _free_direction(g: Tensor, rule: int) -> Tensor:
    if rule == 0:
        return sign(g)
    return g if rule == 1 else torch.zeros_like(g)


class _State:
    """The arena in float32, whatever it is stored as."""

    def __init__(self, state: Sequence[Tensor], *, quantized: bool) -> None:
        self.stored, self.quantized = list(state), quantized
        if quantized:
            pairs = list(zip(state[::2], state[1::2], strict=True))
            self.values = [
                q8.dequantize(codes, scales, signed=number == 0)
                for number, (codes, scales) in enumerate(pairs)
            ]
        else:
            self.values = [array.float() for array in state]

    def store(self, at: Tensor, origin: int, key: int | None) -> None:
        """Write the numbers at positions `at` back."""
        if self.quantized:
            self._store_blocks(at.div(q8.BLOCK, rounding_mode="floor").unique(), origin, key)
            return
        for number, (value, stored) in enumerate(zip(self.values, self.stored, strict=True)):
            result = value[at].to(stored.dtype)
            if key is not None and stored.dtype == torch.bfloat16:
                bits = random_bits(key, at - origin).bitwise_right_shift(16 * number)
                result = stochastic_bits(value[at], bits.bitwise_and(0xFFFF))
            stored[at] = result

    def _store_blocks(self, blocks: Tensor, origin: int, key: int | None) -> None:
        at = (blocks.unsqueeze(1) * q8.BLOCK + torch.arange(q8.BLOCK)).view(-1)
        for number, value in enumerate(self.values):
            random = None
            if key is not None:
                bits = random_bits(key, at - origin).bitwise_right_shift(16 * number)
                random = bits.bitwise_and(0xFFFF).float() / 65536.0
            codes, scales = q8.quantize(value[at], signed=number == 0, random=random)
            self.stored[2 * number][at] = codes
            self.stored[2 * number + 1][blocks] = scales


def frugal_step_reference(  # noqa: PLR0913, PLR0917 - the operator's schema
    weights: list[Tensor],
    grads: list[Tensor],
    state: list[Tensor],
    compensations: list[Tensor],
    segments: Tensor,
    chunks: Tensor,
    index: Tensor | None,
    step_sizes: list[float],
    denom_scales: list[float],
    numbers: list[float],
    choices: list[int],
    scalars: Tensor | None,
) -> None:
    """Do the step of all segments that `chunks` names; see `csrc/cuda/launchers.h`.

    Args:
        weights: contiguous tensors of one dtype.
        grads: their gradients, contiguous, of the same dtype.
        state: the arena's arrays: moments, or (codes, scales) for each moment.
        compensations: one a weight for rounding kahan, else empty.
        segments: int64 [S, 12], see `Field`.
        chunks: int32 [C], the segment of every chunk.
        index: int32, the draws of columns and rows.
        step_sizes: lr * scale / (1 - beta1^t) of each tensor.
        denom_scales: 1 / sqrt(1 - beta2^t) of each tensor.
        numbers: decay, free_step, 1 - beta1, 1 - beta2, eps.
        choices: full rule, free rule, rounding, quantized, maximize, call tag.
        scalars: what `frugal_clock` wrote, to be used instead of lr's part of the numbers; or None.
    """
    if scalars is not None:
        numbers, step_sizes, denom_scales, call = _read_scalars(scalars, numbers)
        choices = [*choices[:5], call]
    full_rule, free_rule, rounding, quantized, maximize, call = choices
    arena = _State(state, quantized=bool(quantized))
    for number in chunks.unique().tolist():
        row = segments[number].tolist()
        tensor, start, size = row[Field.TENSOR], row[Field.START], row[Field.SIZE]
        if size == 0:
            continue
        key = row[Field.TAG] | (call << 32)
        moment_key = (row[Field.TAG] ^ MOMENT_TAG) | (call << 32)
        run = slice(start, start + size)
        g = grads[tensor].view(-1)[run].float() * (-1.0 if maximize else 1.0)
        update = _free_direction(g, free_rule) * -numbers[1]
        at = slots_of(row, index, g.device)
        has_state = (at >= 0).nonzero().view(-1)
        at = at[has_state]
        moments = [value[at] for value in arena.values]
        update[has_state] = _full_update(
            g[has_state], moments, full_rule, step_sizes[tensor], denom_scales[tensor], numbers
        )
        for value, moment in zip(arena.values, moments, strict=True):
            value[at] = moment
        stochastic = rounding == Rounding.STOCHASTIC
        if at.numel():
            arena.store(at, row[Field.ORIGIN], moment_key if stochastic else None)
        weight = weights[tensor].view(-1)[run]
        kahan = compensations[tensor].view(-1)[run] if compensations else None
        _store_weight(weight, kahan, update, numbers[0], key if stochastic else None, start)


def _read_scalars(
    scalars: Tensor, numbers: Sequence[float]
) -> tuple[list[float], list[float], list[float], int]:
    decay, free_step, _, _, *pairs = scalars.tolist()
    call = int(scalars.view(torch.int32)[2]) & MASK32
    return [decay, free_step, *numbers[2:]], pairs[::2], pairs[1::2], call


def frugal_clock_reference(
    lr: Tensor,
    steps: Tensor,
    calls: Tensor,
    scalars: Tensor,
    numbers: list[float],
    choices: list[int],
) -> None:
    """Advance a captured step's counters and compute its scalars; see `csrc/cuda/launchers.h`.

    Args:
        lr: float32 [1].
        steps: float32, completed updates of each tensor.
        calls: int64 [1], completed calls.
        scalars: float32 [4 + 2 tensors]: decay, free_step, call tag (bits), -, then step size and
            denominator's scale of each tensor.
        numbers: beta1, beta2, weight decay, state-full scale, state-free scale.
        choices: full rule, seed.
    """
    beta1, beta2, weight_decay, full_scale, free_scale = numbers
    full_rule, seed = choices
    rate = float(lr)
    scalars[0], scalars[1] = rate * weight_decay, rate * free_scale
    tag = mix32((seed & MASK32) ^ (int(calls) & MASK32))
    scalars.view(torch.int32)[2] = tag - 2**32 if tag >= 2**31 else tag
    calls += 1
    steps += 1
    for i, step in enumerate(steps.tolist()):
        adamw = full_rule == 0
        scalars[4 + 2 * i] = rate * full_scale / (1 - beta1**step if adamw else 1.0)
        scalars[5 + 2 * i] = (1 - beta2**step) ** -0.5 if adamw else 1.0


def _store_weight(
    weight: Tensor,
    compensation: Tensor | None,
    update: Tensor,
    decay: float,
    key: int | None,
    start: int,
) -> None:
    value = weight.float() if compensation is None else weight.float() + compensation.float()
    value = value + (update - decay * value)
    if key is not None and weight.dtype == torch.bfloat16:
        element = torch.arange(start, start + weight.numel(), device=weight.device)
        weight.copy_(stochastic_bits(value, random_bits(key, element).bitwise_and(0xFFFF)))
        return
    weight.copy_(value)
    if compensation is not None:
        compensation.copy_(value - weight.float())
