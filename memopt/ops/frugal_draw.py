"""The draw of columns and rows for the fused step: schema, reference, and the words both write.

One launch draws the lines of all tensors of a bucket (`csrc/cuda/frugal_draw.cu`) and writes what
the step reads: for columns, a bit mask and the rank before it for every 32, then the numbers of the
chosen ones; for rows, the slot of every row, -1 without state. The reference is
`counter_rng.random_subsets` and a scatter; both give the same words.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from memopt.ops.counter_rng import random_subsets
from memopt.ops.transfer import to_device

SCHEMA = "frugal_draw(Tensor(a!) index, int[] draws) -> ()"
FIELDS = 5
_MASK64 = 2**64 - 1


class Lines(IntEnum):
    """What is drawn; as the segment's `Kind`."""

    COLUMNS = 2
    ROWS = 3


def draw_of(key: int, size: int, count: int, lines: int, position: int) -> tuple[int, ...]:
    """Return one draw in the order of the operator's `draws`; the key as 64 signed bits."""
    return key if key < 2**63 else key - 2**64, size, count, lines, position


def frugal_draw_reference(index: Tensor, draws: Sequence[int]) -> None:
    """Draw `count` of `size` lines for every (key, size, count, lines, position) into `index`.

    Args:
        index: int32; what belongs to no draw stays as it is.
        draws: five numbers a tensor, see `draw_of`; 0 < count < size.
    """
    alike: dict[tuple[int, int, int], list[tuple[int, int]]] = defaultdict(list)
    for first in range(0, len(draws), FIELDS):
        key, size, count, lines, position = draws[first : first + FIELDS]
        alike[size, count, lines].append((key & _MASK64, position))
    for (size, count, lines), members in alike.items():
        chosen = random_subsets([key for key, _ in members], size, count, index.device)
        words = column_words(chosen, size) if lines == Lines.COLUMNS else row_slots(chosen, size)
        at = to_device([position for _, position in members], torch.int64, index.device)
        where = at.unsqueeze(1) + torch.arange(words.shape[1], device=index.device)
        index[where.view(-1)] = words.view(-1)


def column_words(chosen: Tensor, size: int) -> Tensor:
    """Return int32 (tensors, 2 * words + chosen) of ascending numbers (tensors, chosen)."""
    tensors, words = chosen.shape[0], -(-size // 32)
    flags = torch.zeros(tensors, words * 32, dtype=torch.int64, device=chosen.device)
    flags.scatter_(1, chosen, 1)
    flags = flags.view(tensors, words, 32)
    powers = torch.arange(32, device=chosen.device)
    masks = flags.bitwise_left_shift(powers).sum(dim=2)
    masks = torch.where(masks >= 2**31, masks - 2**32, masks)
    counts = flags.sum(dim=2)
    ranks = counts.cumsum(dim=1) - counts
    pairs = torch.stack([masks, ranks], dim=2).view(tensors, 2 * words)
    return torch.cat([pairs, chosen], dim=1).to(torch.int32)


def row_slots(chosen: Tensor, size: int) -> Tensor:
    """Return int32 (tensors, rows): the slot of every row, -1 for rows without state."""
    slots = torch.full((chosen.shape[0], size), -1, dtype=torch.int32, device=chosen.device)
    numbers = torch.arange(chosen.shape[1], dtype=torch.int32, device=chosen.device)
    return slots.scatter_(1, chosen, numbers.expand_as(chosen))
