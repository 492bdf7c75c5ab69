"""One allocation a moment for all the state of a bucket of parameters.

An arena is sub-divided anew at every switch and never re-allocated. Positions are numbers
(elements), not bytes. With 8-bit moments every range starts at a multiple of the quantisation
block; `align` says so to those who place ranges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memopt.ops import quantize as q8
from memopt.ops.counter_rng import random_bits
from memopt.ops.rounding import store_stochastic
from memopt.optim.rules import Moment

SCALE_SUFFIX = "_scale"


@dataclass(frozen=True)
class Dither:
    """Key and first position of the random bits with which moments are rounded; see `rounding`."""

    key: int
    start: int


class Arena:
    """The moments of `capacity` numbers.

    Args:
        capacity: numbers of each moment; a multiple of `align`.
        moments: names and signs.
        dtype: dtype of moments that are stored as they are.
        device: where.
        quantized: store 8-bit codes and one float32 scale for each block of 256.
    """

    def __init__(
        self,
        capacity: int,
        moments: Sequence[Moment],
        *,
        dtype: torch.dtype,
        device: torch.device,
        quantized: bool,
    ) -> None:
        self.capacity, self.moments, self.dtype = capacity, tuple(moments), dtype
        self.quantized = quantized
        self.align = q8.BLOCK if quantized else 1
        assert capacity % self.align == 0
        self.arrays: dict[str, Tensor] = {}
        for moment in moments:
            if quantized:
                codes = torch.zeros(capacity, dtype=torch.uint8, device=device)
                scales = torch.zeros(q8.num_blocks(capacity), dtype=torch.float32, device=device)
                self.arrays[moment.name] = codes
                self.arrays[moment.name + SCALE_SUFFIX] = scales
            else:
                self.arrays[moment.name] = torch.zeros(capacity, dtype=dtype, device=device)

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        """Return the view of one array that belongs to numbers [start, stop)."""
        if name.endswith(SCALE_SUFFIX) and name not in {moment.name for moment in self.moments}:
            start, stop = start // q8.BLOCK, q8.num_blocks(stop)
        return self.arrays[name][start:stop]

    def load(self, start: int, stop: int, dtype: torch.dtype) -> list[Tensor]:
        """Return the moments of [start, stop) in `dtype`: views where they are stored so."""
        if not self.quantized:
            return [self.piece(moment.name, start, stop).to(dtype) for moment in self.moments]
        return [
            q8.dequantize(
                self.piece(moment.name, start, stop),
                self.piece(moment.name + SCALE_SUFFIX, start, stop),
                signed=moment.signed,
            ).to(dtype)
            for moment in self.moments
        ]

    def save(self, start: int, values: Sequence[Tensor], dither: Dither | None) -> None:
        """Write back what `load` returned (nothing to do for views)."""
        for number, (moment, value) in enumerate(zip(self.moments, values, strict=True)):
            stop = start + value.numel()
            piece = self.piece(moment.name, start, stop)
            if self.quantized:
                self._save_codes(moment, start, value, dither, shift=16 * number)
            elif value.data_ptr() == piece.data_ptr():
                continue
            elif dither is not None and piece.dtype == torch.bfloat16:
                flat = value.reshape(-1)
                store_stochastic(piece, flat, dither.key, dither.start, shift=16 * number)
            else:
                piece.copy_(value.reshape(-1))

    def _save_codes(
        self, moment: Moment, start: int, value: Tensor, dither: Dither | None, *, shift: int
    ) -> None:
        flat = value.reshape(-1).float()
        random = None
        if dither is not None:
            index = torch.arange(dither.start, dither.start + flat.numel(), device=flat.device)
            bits = random_bits(dither.key, index).bitwise_right_shift_(shift)
            random = bits.bitwise_and_(0xFFFF).float().div_(65536.0)
        codes, scales = q8.quantize(flat, signed=moment.signed, random=random)
        self.piece(moment.name, start, start + flat.numel()).copy_(codes)
        self.piece(moment.name + SCALE_SUFFIX, start, start + flat.numel()).copy_(scales)

    def zero(self) -> None:
        """Forget everything, in place."""
        for array in self.arrays.values():
            array.zero_()

    def num_bytes(self) -> int:
        """Return the bytes of all arrays."""
        return sum(array.numel() * array.element_size() for array in self.arrays.values())

    def aligned(self, size: int) -> int:
        """Round a size up to where the next range may start."""
        return -(-size // self.align) * self.align
