"""How a float32 result is put into a low-precision tensor.

- nearest: PyTorch's own cast.
- stochastic: up or down with the probability that makes the mean right, so that updates smaller
  than half a unit in the last place are not lost on average.
- kahan: the rounding error is kept in a second low-precision tensor and added back the next time
  (a two-term weight: value + compensation).
"""

from __future__ import annotations

import torch
from torch import Tensor

from memopt.ops.counter_rng import random_bits


def stochastic_bits(value: Tensor, random16: Tensor) -> Tensor:
    """Round float32 to bfloat16 stochastically; `random16` holds 16 random bits an element.

    A bfloat16 is the upper half of a float32. Adding a uniform 16-bit integer to the lower half
    and cutting it off rounds away from zero with probability (lower half) / 2**16. Infinities and
    NaN keep their meaning: they are cast by PyTorch.
    """
    raw = value.view(torch.int32)
    rounded = (raw + random16.to(torch.int32)).bitwise_and_(-65536).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)


def store_stochastic(
    target: Tensor, value: Tensor, key: int, start: int, *, shift: int = 0
) -> None:
    """Write float32 `value` into bfloat16 `target`; element i uses the bits of `start + i`."""
    index = torch.arange(start, start + value.numel(), device=value.device)
    random16 = random_bits(key, index).bitwise_right_shift_(shift).bitwise_and_(0xFFFF)
    target.copy_(stochastic_bits(value, random16.view(value.shape)))


def store_kahan(target: Tensor, compensation: Tensor, value: Tensor) -> None:
    """Write float32 `value` as `target + compensation`, both of the low precision."""
    target.copy_(value)
    compensation.copy_(value - target.to(value.dtype))
