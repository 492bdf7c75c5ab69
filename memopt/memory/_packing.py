"""Which buffers go into which slabs: those that a plan's buffers need anew, and those that they leave empty."""

from __future__ import annotations

from collections.abc import Sequence

from memopt.memory._slab import Slab

__all__ = ["packed", "unneeded"]

_SPARE_SHARE = 16


def packed(
    blocks: Sequence[int], old: Sequence[int], room: int, chunk_bytes: int
) -> tuple[list[int], int]:
    """Fit ``blocks`` (large first) into slabs of ``old`` sizes, then into new ones.

    Returns the sizes of the new ones, together at most ``room``, and the bytes that found none.
    """
    left = list(old)
    new: list[int] = []
    left_out = 0
    for size in blocks:
        fits = next((i for i, free in enumerate(left) if free >= size), None)
        if fits is not None:
            left[fits] -= size
        elif size > room:
            left_out += size
        else:
            room -= size
            if new and new[-1] + size <= chunk_bytes:
                new[-1] += size
            else:
                new.append(size)
    return new, left_out


def unneeded(
    busy: Sequence[Slab], idle: Sequence[Slab], blocks: Sequence[int], spare_bytes: int
) -> list[Slab]:
    """Return the idle slabs that stay empty when `blocks` are packed, large first, into the first slab with room.

    Busy slabs, which stay in any case, are filled first. Buffers that wait for an event hold more than a perfect
    packing, so slabs of at least `spare_bytes`, or a sixteenth of what is needed, stay beside it.
    """
    slabs = [*busy, *idle]
    left = [slab.nbytes for slab in slabs]
    for size in sorted(blocks, reverse=True):
        fits = next((i for i, free in enumerate(left) if free >= size), None)
        if fits is not None:
            left[fits] -= size
    spare = max(spare_bytes, sum(blocks) // _SPARE_SHARE) - sum(left[: len(busy)])
    empty = [s for s, free in zip(idle, left[len(busy) :], strict=True) if free == s.nbytes]
    while empty and spare > 0:
        spare -= empty.pop(0).nbytes
    return empty
