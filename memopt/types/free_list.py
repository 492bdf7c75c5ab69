"""Free space of an arena or of an extent file: best fit over half-open intervals, neighbours joined when freed.

Sizes repeat from step to step, so best fit finds the very interval that was freed a step ago and nothing fragments.
Both indexes cost O(log n) comparisons; n is the number of holes.
"""

from __future__ import annotations

import bisect

__all__ = ["FreeList"]


class FreeList:
    """Intervals ``[start, start + nbytes)`` that are free. Not thread-safe; sizes are the caller's units."""

    def __init__(self) -> None:
        self._size_at: dict[int, int] = {}
        self._start_of_end: dict[int, int] = {}
        self._by_size: list[tuple[int, int]] = []
        self.free_bytes = 0

    @property
    def largest_bytes(self) -> int:
        """Size of the largest hole, 0 when nothing is free."""
        return self._by_size[-1][0] if self._by_size else 0

    def add(self, start: int, nbytes: int) -> None:
        """Free ``[start, start + nbytes)`` and join it with free neighbours."""
        assert nbytes > 0, (start, nbytes)
        self.free_bytes += nbytes
        if start + nbytes in self._size_at:
            nbytes += self._remove(start + nbytes)
        before = self._start_of_end.get(start)
        if before is not None:
            nbytes += self._remove(before)
            start = before
        self._insert(start, nbytes)

    def take(self, nbytes: int) -> int | None:
        """Take ``nbytes`` from the smallest hole that holds them; return its start, or None when there is none."""
        assert nbytes > 0, nbytes
        at = bisect.bisect_left(self._by_size, (nbytes, -1))
        if at == len(self._by_size):
            return None
        size, start = self._by_size[at]
        self._remove(start)
        if size > nbytes:
            self._insert(start + nbytes, size - nbytes)
        self.free_bytes -= nbytes
        return start

    def hole_at(self, start: int) -> int:
        """Return the size of the hole that begins at ``start``, 0 when none does."""
        return self._size_at.get(start, 0)

    def take_hole(self, start: int) -> int:
        """Take the whole hole that begins at ``start``; return its size."""
        nbytes = self._remove(start)
        self.free_bytes -= nbytes
        return nbytes

    def take_largest(self, limit_bytes: int) -> tuple[int, int] | None:
        """Take the largest hole, at most ``limit_bytes`` of it; return ``(start, nbytes)``, or None."""
        if not self._by_size:
            return None
        nbytes = min(self.largest_bytes, limit_bytes)
        start = self.take(nbytes)
        assert start is not None
        return start, nbytes

    def _insert(self, start: int, nbytes: int) -> None:
        self._size_at[start] = nbytes
        self._start_of_end[start + nbytes] = start
        bisect.insort(self._by_size, (nbytes, start))

    def _remove(self, start: int) -> int:
        nbytes = self._size_at.pop(start)
        del self._start_of_end[start + nbytes]
        del self._by_size[bisect.bisect_left(self._by_size, (nbytes, start))]
        return nbytes
