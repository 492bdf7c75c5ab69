"""One directory's share of an extent store: a nameless file, its reserved bytes, the free ones."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from memopt.io.files import IoFile, create_unlinked
from memopt.types.errors import NO_ROOM_ERRNOS
from memopt.types.free_list import FreeList

__all__ = ["Area", "DiskFull", "ExtentStoreFull", "budget_used_up", "open_area"]


class ExtentStoreFull(OSError):  # noqa: N818 - the name says what is the matter
    """No space for an extent: the budget is used up, or the disk has less than the budget promised (errno ENOSPC)."""


class DiskFull(ExtentStoreFull):
    """The disk has less than the budget promised: somebody else took it."""


@dataclass(kw_only=True, eq=False)
class Area:
    """An extent file that may grow to ``budget_bytes``. Not thread-safe; all sizes are multiples of its unit."""

    file: IoFile
    budget_bytes: int
    reserved_bytes: int = 0
    free: FreeList = field(default_factory=FreeList)

    @property
    def available_bytes(self) -> int:
        """Bytes that can still be taken, as far as the budget goes."""
        return self.budget_bytes - self.reserved_bytes + self.free.free_bytes

    def take(self, nbytes: int, growth_bytes: int) -> list[tuple[int, int]]:
        """Take ``nbytes``, in one piece while the file may grow, else in as few holes as there are.

        Raises:
            DiskFull: the disk refuses the growth that is needed; nothing was taken.
        """
        assert nbytes <= self.available_bytes, (nbytes, self.available_bytes)
        start = self.free.take(nbytes)
        if start is None:
            room = self.budget_bytes - self.reserved_bytes
            if room:
                self._grow(
                    min(nbytes, room), nbytes - self.free.free_bytes, min(growth_bytes, room)
                )
            start = self.free.take(nbytes)
        if start is not None:
            return [(start, nbytes)]
        holes: list[tuple[int, int]] = []
        while nbytes:
            hole = self.free.take_largest(nbytes)
            assert hole is not None
            holes.append(hole)
            nbytes -= hole[1]
        return holes

    def _grow(self, wanted: int, needed: int, growth_bytes: int) -> None:
        """Reserve ``growth_bytes`` more on disk, or less where the disk refuses that, but at least ``needed``."""
        steps = sorted({max(wanted, growth_bytes), wanted, max(needed, 0)}, reverse=True)
        for step in steps:
            error = self._reserve(step) if step else None
            if error is None:
                return
            if error.errno not in NO_ROOM_ERRNOS or step == steps[-1]:
                raise error

    def _reserve(self, nbytes: int) -> OSError | None:
        fd = self.file.buffered_fd
        try:
            os.posix_fallocate(fd, self.reserved_bytes, nbytes)
        except OSError as error:
            with contextlib.suppress(OSError):  # give back what a failed reservation left behind
                os.ftruncate(fd, self.reserved_bytes)
            return self._refused(error, nbytes)
        self.free.add(self.reserved_bytes, nbytes)
        self.reserved_bytes += nbytes
        return None

    def _refused(self, error: OSError, nbytes: int) -> OSError:
        remedy = "Free space in this directory or lower the ssd budget"
        if error.errno == errno.EFBIG:
            remedy = (
                "No file may be larger here (ulimit -f, or the file system): lower the ssd budget"
            )
        text = (
            f"{error.strerror}: reserving {nbytes} bytes at offset {self.reserved_bytes} of a spill file that may grow "
            f"to {self.budget_bytes} bytes; no data was lost. {remedy}"
        )
        kind = DiskFull if error.errno in NO_ROOM_ERRNOS else OSError
        return kind(error.errno, text, self.file.path)


def open_area(path: str | os.PathLike[str], size_bytes: int, *, direct: bool = True) -> Area:
    """Create the extent file of ``path``; nothing is reserved yet.

    Raises:
        ValueError: ``size_bytes`` is smaller than one unit of the file system.
        OSError: the directory is missing, not writable, or read-only (errno and path).
    """
    file = create_unlinked(path, direct=direct)
    budget_bytes = size_bytes // file.unit_bytes * file.unit_bytes
    if budget_bytes <= 0:
        file.close()
        raise ValueError(
            f"size_bytes={size_bytes} for {os.fspath(path)!r} is below one unit of {file.unit_bytes}"
        )
    return Area(file=file, budget_bytes=budget_bytes)


def budget_used_up(areas: Sequence[Area], nbytes: int, available: int) -> ExtentStoreFull:
    """Return the error of a request for more than the budget has left."""
    budget = ", ".join(f"{area.file.path}: {area.budget_bytes}" for area in areas)
    text = (
        f"the ssd budget is used up: {nbytes} bytes asked, {available} of "
        f"{sum(area.budget_bytes for area in areas)} left ({budget}); raise the ssd budget"
    )
    return ExtentStoreFull(errno.ENOSPC, text, areas[0].file.path)
