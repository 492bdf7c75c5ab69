"""What an extent is; the store in ``extents.py`` makes, fills and frees them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import compress, zip_longest
from operator import methodcaller
from typing import Any, TypeVar

from memopt.io.engine import Ticket
from memopt.io.pieces import Kind

__all__ = ["Extent", "ExtentStats", "Pending", "Run", "holding", "interleaved"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Run:
    """``nbytes`` (a multiple of the unit) at ``offset`` of file number ``area_index``."""

    area_index: int
    offset: int
    nbytes: int


def interleaved(runs: Sequence[Run], stripe_bytes: int) -> list[Run]:
    """Cut runs into stripes and take them from one file after the other, so that any long part is on all disks."""
    if len({run.area_index for run in runs}) < 2:
        return list(runs)
    stripes: dict[int, list[Run]] = {}
    for run in runs:
        for begin in range(0, run.nbytes, stripe_bytes):
            nbytes = min(stripe_bytes, run.nbytes - begin)
            stripe = Run(run.area_index, run.offset + begin, nbytes)
            stripes.setdefault(run.area_index, []).append(stripe)
    rows = zip_longest(*stripes.values())
    return [stripe for row in rows for stripe in row if stripe is not None]


@dataclass(frozen=True, slots=True)
class Pending:
    """A transfer in flight on the units ``[begin, end)`` of an extent."""

    kind: Kind
    begin: int
    end: int
    ticket: Ticket


@dataclass(kw_only=True, eq=False)
class Extent:
    """Space for ``nbytes`` bytes; ``written_bytes`` of them, from the start, can be read back."""

    nbytes: int
    runs: tuple[Run, ...]
    written_bytes: int = 0
    freed: bool = False
    failed: Ticket | None = None  # a write that did not reach the disk
    pending: list[Pending] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    """Held by who starts a transfer, so that two threads see each other's."""

    @property
    def allocated_bytes(self) -> int:
        """Bytes taken from the budget: ``nbytes`` rounded up to the file's unit."""
        return sum(run.nbytes for run in self.runs)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtentStats:
    """Bytes of all directories. ``reserved`` is on disk, ``in_use`` belongs to extents (rounded up to units)."""

    budget_bytes: int
    reserved_bytes: int
    in_use_bytes: int
    asked_bytes: int
    peak_bytes: int
    written_bytes: int
    read_bytes: int
    num_extents: int


def holding(extents: Iterable[Extent], work: Callable[[], T]) -> T:
    """Call ``work`` with the extents' locks held.

    They are taken in one order, so that no two batches wait for each other, and both taken and let go in one step of C:
    a KeyboardInterrupt leaves none held.
    """
    locks = [extent.lock for extent in sorted(extents, key=id)]
    held: list[bool] = []
    let_go: partial[deque[Any]] = partial(
        deque, map(methodcaller("release"), compress(locks, held)), 0
    )
    try:
        held.extend(map(methodcaller("acquire"), locks))
        return work()
    finally:
        let_go()
