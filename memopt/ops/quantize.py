"""8-bit optimizer moments: blocks of 256 numbers, one float32 scale each.

A block's scale is its largest magnitude. The codes are companded, as small numbers matter in an
Adam denominator: a first moment is stored as `sign(x) sqrt(|x| / scale)` on 255 levels (two's
complement), a second moment as its fourth root on 256 levels; code 0 is 0.
The smallest non-zero code is 6e-5 of the scale for the
first and 2e-10 for the second moment, and a second moment that is not zero never becomes zero
(which would turn the step into `m / eps`). Per number: 1 + 4/256 bytes.
A block with an infinity or NaN gets the scale NaN, and all of it reads back as NaN: a broken
gradient spreads to its block's other weights, but is never taken for a finite moment.
Blockwise 8-bit state is from "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861);
that paper looks codes up in a table, companding needs none.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256


def num_blocks(num_elements: int) -> int:
    """Return how many scales `num_elements` numbers need."""
    return -(-num_elements // BLOCK)


def _blocks(value: Tensor) -> Tensor:
    missing = -value.numel() % BLOCK
    flat = value.reshape(-1)
    if missing:
        flat = torch.cat([flat, flat.new_zeros(missing)])
    return flat.view(-1, BLOCK)


def quantize(value: Tensor, *, signed: bool, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (codes uint8 of `value.numel()`, scales float32 of one per block).

    Args:
        value: float32, any shape; unsigned moments must not be negative.
        signed: first moments are, second moments are not.
        random: uniform numbers in [0, 1), one per element, for stochastic rounding of the codes.
    """
    blocks = _blocks(value)
    scale = blocks.abs().amax(dim=1, keepdim=True)  # NaN where the block has one
    broken = scale.isfinite().logical_not_()
    unit = blocks / torch.where(scale > 0, scale, torch.ones_like(scale))
    if signed:
        level = unit.abs().sqrt_().mul_(127.0).copysign_(unit)
    else:
        level = unit.sqrt_().sqrt_().mul_(255.0)
    if random is None:
        level = level.round_()
    else:
        level = (level + _blocks(random)).floor_()
    if signed:
        codes = level.clamp_(-127, 127).to(torch.int8).view(torch.uint8)
    else:
        level = torch.where((level == 0) & (blocks > 0), torch.ones_like(level), level)
        codes = level.clamp_(0, 255).to(torch.uint8)
    codes.masked_fill_(broken, 0)
    scale.masked_fill_(broken, torch.nan)
    return codes.view(-1)[: value.numel()], scale.view(-1)


def dequantize(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """Return the float32 numbers of `codes` (flat)."""
    if signed:
        level = codes.view(torch.int8).float() / 127.0
        unit = level * level.abs()
    else:
        level = codes.float() / 255.0
        unit = level.square().square_()
    return unit.mul_(scales.repeat_interleave(BLOCK)[: codes.numel()])
