"""The step as one kernel launch: which buckets it can take, its tables, and the call.

Tables have the same shape in every round (unused segments and chunks are empty), so a switch fills
them in place: nothing is allocated, and a captured CUDA graph stays valid.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from memopt.ops import frugal_step as op
from memopt.ops.frugal_draw import draw_of
from memopt.ops.frugal_step import CHUNK, Kind, Rounding
from memopt.ops.native import cuda_status
from memopt.optim.bucket import Bucket, Entry
from memopt.optim.parts import LeadingRows, Part
from memopt.optim.rules import StateFreeRule, StateFullRule
from memopt.optim.selections.axes import ChosenColumns, ChosenRows, Drawn
from memopt.optim.selections.coordinates import Strata
from memopt.optim.settings import Settings
from memopt.optim.tensors import share

_FREE, _FULL, _COLUMNS, _ROWS, _STRATA = (
    int(Kind[k]) for k in ("FREE", "FULL", "COLUMNS", "ROWS", "STRATA")
)
# StrataSlots in csrc/cuda/frugal_tiles.cuh counts strata, and distances near a tile, in 32 bits.
MOST_STRATA, LONGEST_STRATUM = 2**31, 2**22
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(  # noqa: PLR0911 - one return a reason
    bucket: Bucket, settings: Settings, full: StateFullRule, free: StateFreeRule
) -> str:
    """Return why the kernel cannot step a bucket; empty when it can."""
    if full.native_code < 0 or free.native_code < 0:
        return f"the rules {full.name} and {free.name} are not both in the kernel"
    if bucket.dtype not in _DTYPES:
        return f"weights are {bucket.dtype}"
    if any(entry.selection.low_rank for entry in bucket.entries):
        return f"selection {settings.selection} is matrix products"
    if settings.quantize is not None and settings.split and not _blocks_are_whole(bucket, settings):
        return f"8-bit moments of selection {settings.selection} do not fall into whole blocks"
    if settings.split and (size := _too_large(bucket, settings.current_density)):
        return f"the strata of a tensor of {size} elements do not fit the kernel's 32 bits"
    if bucket.device.type != "cuda":
        return f"the parameters are on {bucket.device.type}"
    status = cuda_status()
    return "" if status.available else status.reason


def _too_large(bucket: Bucket, density: float) -> int:
    """Return the size of a tensor whose strata are too many or too long for the kernel, else 0."""
    for entry in bucket.entries:
        count = share(density, entry.size)
        computed = entry.selection.name == "coordinates" and 0 < count < entry.size
        if computed and (count >= MOST_STRATA or entry.size // count >= LONGEST_STRATUM):
            return entry.size
    return 0


def _blocks_are_whole(bucket: Bucket, settings: Settings) -> bool:
    """Whether quantisation blocks never cross rows that are apart in the weight."""
    if settings.selection == "blocks":
        return True
    if settings.selection != "rows":
        return False
    return all(e.columns % 256 == 0 and not e.vector for e in bucket.entries)


@dataclass
class Tables:
    """The kernel's tables for some parameters of a bucket, and for which layout they are filled."""

    indices: tuple[int, ...]
    segments: Tensor
    chunks: Tensor
    index: Tensor | None
    index_at: list[int]
    generation: int = -1
    layout: list[tuple[Extent, int]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)


def max_chunks(bucket: Bucket, indices: Sequence[int]) -> int:
    """Return how many chunks the tables of some parameters have."""
    # A tensor cut in two has one chunk more than a whole one; under blocks there is one such tensor.
    return sum(-(-bucket.entries[i].size // CHUNK) + 1 for i in indices)


def make_tables(bucket: Bucket, indices: Sequence[int], *, split: bool) -> Tables:
    """Allocate tables that fit every round of a group that is split, or is not."""
    index_at, words = [], 0
    for i in indices:
        entry = bucket.entries[i]
        index_at.append(words)
        if entry.selection.needs_matrix:
            # rows: a slot each; columns: mask and rank of every 32, then the chosen ones' numbers
            words += max(entry.rows, 2 * -(-entry.columns // 32) + entry.columns)
            words += words % 2  # masks and ranks are read as pairs
    indexed = any(bucket.entries[i].selection.name != "blocks" for i in indices)
    device = bucket.device
    return Tables(
        indices=tuple(indices),
        segments=torch.zeros(2 * len(indices) + 1, op.FIELDS, dtype=torch.int64, device=device),
        chunks=torch.zeros(max_chunks(bucket, indices), dtype=torch.int32, device=device),
        index=torch.zeros(max(words, 2), dtype=torch.int32, device=device)
        if indexed and split
        else None,
        index_at=index_at,
    )


def fill_tables(tables: Tables, bucket: Bucket) -> None:
    """Write the current layout into the tables.

    Runs at every switch, for every parameter, before the kernel can start: what the last layout
    had already is not made again (of columns and rows only the index changes).
    """
    if tables.generation == bucket.generation:
        return
    layout = [(_extent(bucket.parts[i]), bucket.offsets[i]) for i in tables.indices]
    if layout != tables.layout:
        _write_segments(tables, bucket, layout)
        tables.layout = layout
    if tables.index is not None:
        _draw(tables, bucket)
    tables.generation = bucket.generation


# Of a part, all that its segments depend on: kind, numbers or lines with state, a draw's key and offset.
Extent = tuple[int, int, int, int]


def _extent(part: Part | None) -> Extent:
    if isinstance(part, LeadingRows):
        return _FULL, part.num_slots, 0, 0
    if isinstance(part, Drawn):
        return part.lines, part.draw.count, 0, 0
    assert isinstance(part, Strata)
    key = part.key if part.key < 2**63 else part.key - 2**64
    return _STRATA, part.count, key, part.offset


def _write_segments(tables: Tables, bucket: Bucket, layout: Sequence[tuple[Extent, int]]) -> None:
    """Write the segments and which of them each chunk belongs to; both end with empty ones."""
    numbers = array("q")
    counts: list[int] = []
    first = 0
    for tensor, (i, (extent, origin)) in enumerate(zip(tables.indices, layout, strict=True)):
        entry, index_at = bucket.entries[i], tables.index_at[tensor]
        for kind, start, size, *draw in _segments_of(entry, extent, index_at):
            # in the order of `Field`; `draw` is A, B, KEY, OFFSET
            numbers.extend((tensor, kind, start, size, origin, first, origin, entry.tag, *draw))
            counts.append(-(-size // CHUNK))
            first += counts[-1]
    assert len(numbers) < tables.segments.numel()
    numbers.frombytes(bytes(8 * (tables.segments.numel() - len(numbers))))
    bucket.room.copy_into(tables.segments, np.frombuffer(numbers, dtype=np.int64))
    capacity = tables.chunks.numel()
    counts += [0] * (tables.segments.shape[0] - len(counts))
    counts[-1] = capacity - first  # the last segment is empty and takes the unused chunks
    if counts != tables.counts:
        chunks = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        bucket.room.copy_into(tables.chunks, chunks)
        tables.counts = counts


def _segments_of(entry: Entry, extent: Extent, index_at: int) -> list[tuple[int, ...]]:
    """Return (kind, start, size, A, B, KEY, OFFSET) of a parameter's segments."""
    kind, count, key, offset = extent
    if kind == _FULL:
        parts = [
            (_FULL, 0, count, 0, 0, 0, 0),
            (_FREE, count, entry.size - count, 0, 0, 0, 0),
        ]
        return [segment for segment in parts if segment[2]]
    if kind == _STRATA:
        return [(kind, 0, entry.size, entry.size, count, key, offset)]
    return [(kind, 0, entry.size, entry.columns, count, index_at, 0)]


def _draw(tables: Tables, bucket: Bucket) -> None:
    """Draw columns and rows straight into the index, all tensors in one launch."""
    draws: list[int] = []
    for i, position, (extent, _) in zip(
        tables.indices, tables.index_at, tables.layout, strict=True
    ):
        if extent[0] in (_COLUMNS, _ROWS):
            part = bucket.parts[i]
            assert isinstance(part, (ChosenColumns, ChosenRows))
            draws += draw_of(part.key, part.draw.size, part.draw.count, part.lines, position)
    if draws:
        torch.ops.memopt.frugal_draw(tables.index, draws)


def corrections(
    steps: Sequence[int], settings: Settings, full: StateFullRule, lr: float
) -> tuple[list[float], list[float]]:
    """Return (step sizes, denominator scales); counters mostly agree, so each is computed once."""
    beta1, beta2 = settings.betas
    size = lr * settings.full_scale
    if full.name != "adamw":
        return [size] * len(steps), [1.0] * len(steps)
    table = {t: (size / (1 - beta1**t), (1 - beta2**t) ** -0.5) for t in set(steps)}
    return [table[t][0] for t in steps], [table[t][1] for t in steps]


def numbers_of(settings: Settings, lr: float) -> list[float]:
    """Return the operator's `numbers`."""
    beta1, beta2 = settings.betas
    free = lr * settings.free_scale
    return [lr * settings.weight_decay, free, 1 - beta1, 1 - beta2, settings.eps]


def choices_of(
    settings: Settings, full: StateFullRule, free: StateFreeRule, call_tag: int
) -> list[int]:
    """Return the operator's `choices`."""
    rounding = Rounding[settings.rounding.upper()]
    quantized, maximize = settings.quantize is not None, settings.maximize
    return [full.native_code, free.native_code, rounding, quantized, maximize, call_tag]
