"""Extents: aligned runs of bytes in one pre-allocated, nameless file per directory.

An extent is where one spilled tensor lives. Its space is reserved on the disk (``fallocate``) before ``alloc`` returns,
so a full disk is refused while the data is still in memory, never in the middle of a write. The file grows in steps up
to the directory's budget and is reused from step to step. With several directories, large extents are striped over all
of them (one contiguous run each, taken in turns of 4 MiB, so that the disks stay sequential and no part of a tensor has
to wait for one of them alone) and small ones go round robin.
A budget is never lost to fragmentation: an extent that finds no hole of its size is made of several.

Limits: file systems that copy on write (btrfs, zfs) do not honour the reservation; there a full disk still surfaces as
an error of the write, and the data is still in the caller's buffer.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from memopt.io.areas import Area, ExtentStoreFull, budget_used_up, open_area
from memopt.io.buffers import Buffer, BufferView, RawBuffer, view_of
from memopt.io.depth import depth_for
from memopt.io.engine import Engine, EngineName, Ticket, fresh, open_engine
from memopt.io.extent import Extent, ExtentStats, Pending, Run, holding, interleaved
from memopt.io.files import IoFile
from memopt.io.pieces import Kind, Transfer

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Extent", "ExtentStats", "ExtentStore", "ExtentStoreFull"]

_STRIPE_BYTES = 4 << 20
"""Of one directory before the next one follows: half of what keeps a disk busy (``depth.py``)."""


class ExtentStore:
    """Extents in one or several directories, moved by one engine. Thread-safe.

    Threads that use one extent take turns: each transfer waits for those before it that touch the same units (two reads
    do not), in the order in which the calls got the extent. Only :meth:`free` is for whoever uses an extent last.

    Args:
        directories: pairs of a directory and the bytes it may hold.
        engine: one to share (the caller closes it), or the name of one to open (closed with the store).
        growth_bytes: the files grow in steps of this size.
        stripe_bytes: extents of at least this many bytes per directory are striped.
        direct: use O_DIRECT where it works.

    Raises:
        ValueError: no directory, or a budget below one unit.
        OSError: a directory is missing, not writable or read-only (errno and path).
    """

    def __init__(
        self,
        directories: Sequence[tuple[str | os.PathLike[str], int]],
        engine: Engine | EngineName = "auto",
        *,
        growth_bytes: int = 256 << 20,
        stripe_bytes: int = 1 << 20,
        direct: bool = True,
    ) -> None:
        if not directories:
            raise ValueError("directories is empty; name at least one (path, size_bytes)")
        self._lock = threading.RLock()
        self._areas: list[Area] = []
        self._next_area = 0
        self._stripe_bytes = stripe_bytes
        self._live: set[Extent] = set()
        self._returned: deque[Extent] = deque()
        self._leaving: list[Extent] = []
        self._peak_bytes = self._written_bytes = self._read_bytes = 0
        self._closed = False
        self._closing = threading.RLock()
        self._unseen: OSError | None = None  # for `close` to raise
        self._owns_engine = isinstance(engine, str)
        self.engine: Engine = (
            open_engine(
                engine,
                queue_depth=depth_for({}, num_directories=len(directories)),
                directory=directories[0][0],
            )
            if isinstance(engine, str)
            else engine
        )
        try:
            for path, size_bytes in directories:
                self._areas.append(open_area(path, size_bytes, direct=direct))
        except BaseException:
            self.close()
            raise
        self.unit_bytes = max(area.file.unit_bytes for area in self._areas)
        """Every extent's space is a multiple of this."""
        for area in self._areas:
            area.budget_bytes = area.budget_bytes // self.unit_bytes * self.unit_bytes
        self._growth_bytes = -(-growth_bytes // self.unit_bytes) * self.unit_bytes

    @property
    def files(self) -> tuple[IoFile, ...]:
        """The open files, one per directory, in the order given."""
        return tuple(area.file for area in self._areas)

    def alloc(self, nbytes: int, *, counted: bool = True) -> Extent:
        """Return space for ``nbytes`` bytes, reserved on disk; ``counted``: in ``peak_bytes`` too.

        Raises:
            ValueError: ``nbytes`` is negative, or the store is closed.
            ExtentStoreFull: the budget is used up, or the disk is; nothing was changed.
        """
        if nbytes < 0:
            raise ValueError(f"nbytes={nbytes} is negative")
        with self._lock:
            self._check_open()
            need = -(-nbytes // self.unit_bytes) * self.unit_bytes
            self._collect(need)
            available = self._available_bytes()
            if need > available:
                raise budget_used_up(self._areas, nbytes, available)
            extent = Extent(nbytes=nbytes, runs=tuple(interleaved(self._take(need), _STRIPE_BYTES)))
            self._live.add(extent)
            if counted:
                self._peak_bytes = max(self._peak_bytes, self._in_use_bytes())
            return extent

    def free(self, extent: Extent) -> None:
        """Give the space back. It is reused only after the extent's transfers in flight have finished.

        Takes no lock and asks no ticket: whoever owns an extent may free it in its ``__del__``, which the garbage
        collector can run in the middle of any method here, on the same thread.
        """
        if extent.freed or extent not in self._live:
            if self._closed:
                return
            raise ValueError("this extent was freed before, or belongs to another store")
        extent.freed = True
        self._returned.append(extent)

    def write(self, extent: Extent, buffer: Buffer, *, offset: int = 0) -> Ticket:
        """Start writing ``buffer`` to ``extent`` from byte ``offset`` on; see :meth:`write_batch`.

        A write at offset 0 replaces what the extent held; later parts follow without holes.
        """
        return self._submit("write", [(extent, buffer, offset)])

    def prepare_write(
        self,
        extent: Extent,
        buffer: Buffer,
        *,
        offset: int = 0,
        alive: Callable[[], object] | None = None,
    ) -> Ticket:
        """As :meth:`write`, but nothing moves before the ticket is released; see :meth:`Engine.prepare`."""
        return self._submit(
            "write",
            [(extent, buffer, offset)],
            lambda transfers: self.engine.prepare(transfers, alive=alive),
        )

    def read(
        self,
        extent: Extent,
        buffer: Buffer,
        *,
        offset: int = 0,
        when_over: RawBuffer | None = None,
    ) -> Ticket:
        """Start filling ``buffer`` from byte ``offset`` of ``extent``; see :meth:`read_batch`, :class:`Engine`."""
        return self._submit(
            "read",
            [(extent, buffer, offset)],
            lambda transfers: self.engine.submit(transfers, when_over=when_over),
        )

    def write_batch(self, items: Sequence[tuple[Extent, Buffer]]) -> Ticket:
        """Start writing several buffers, each to its extent, with one submission.

        Waits for transfers in flight on these extents first. A write may start anywhere up to ``written_bytes``; one
        that starts inside a unit or ends inside one before the extent's end goes through the page cache.

        Raises:
            ValueError: a buffer larger than its extent, or a freed extent.
            OSError: an earlier write of one of the extents failed; a write at offset 0 goes through once that error
                was raised.
        """
        return self._submit("write", [(extent, buffer, 0) for extent, buffer in items])

    def read_batch(self, items: Sequence[tuple[Extent, Buffer]]) -> Ticket:
        """Start filling several buffers, each from its extent; waits for writes in flight on them first.

        Raises:
            ValueError: more bytes asked than were written, a read-only buffer, or a freed extent.
            OSError: the extent's last write failed (its data is not on the disk).
        """
        return self._submit("read", [(extent, buffer, 0) for extent, buffer in items])

    def wait(self, ticket: Ticket, timeout_s: float | None = None) -> None:
        """Same as ``ticket.wait(timeout_s)``."""
        ticket.wait(timeout_s)

    def stats(self) -> ExtentStats:
        """Return the bytes in use and moved so far."""
        with self._lock:
            self._collect(0)
            return ExtentStats(
                budget_bytes=sum(area.budget_bytes for area in self._areas),
                reserved_bytes=sum(area.reserved_bytes for area in self._areas),
                in_use_bytes=self._in_use_bytes(),
                asked_bytes=sum(extent.nbytes for extent in self._live),
                peak_bytes=self._peak_bytes,
                written_bytes=self._written_bytes,
                read_bytes=self._read_bytes,
                num_extents=len(self._live),
            )

    def close(self) -> None:
        """Wait for transfers in flight, then close every file (the disk space returns) and the store's own engine.

        Safe to call twice, and again after a KeyboardInterrupt anywhere in here: the second call does the rest.

        In a forked child it closes the child's descriptors and leaves the parent's transfers alone.

        Raises:
            OSError: a transfer failed and nobody waited for it; raised after everything was released.
        """
        if self.engine.is_inherited:
            self._closed = True
            self._release()
            return
        with self._closing:
            with self._lock:
                self._closed = True
                busy = (*self._live, *self._leaving)
                tickets = [pending.ticket for extent in busy for pending in extent.pending]
            for ticket in tickets:
                ticket.cancel()
                ticket._finished(None)
                if ticket.error is not None and not ticket.claimed:
                    self._unseen = self._unseen or fresh(ticket.error)
                ticket.claimed = True
                ticket.done()
            self._release()
            self._live.clear()
            self._leaving.clear()
            unseen, self._unseen = self._unseen, None
        if unseen is not None:
            raise unseen

    def _release(self) -> None:
        for area in self._areas:
            self.engine.detach(area.file)
            area.file.close()
        if self._owns_engine:
            self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(
        self,
        kind: Kind,
        items: Sequence[tuple[Extent, Buffer, int]],
        start: Callable[[list[Transfer]], Ticket] | None = None,
    ) -> Ticket:
        views = [view_of(buffer, writable=kind == "read") for _, buffer, _ in items]
        begin = partial(self._submit_views, kind, items, views, start or self.engine.submit)
        return holding({extent for extent, _, _ in items}, begin)

    def _submit_views(
        self,
        kind: Kind,
        items: Sequence[tuple[Extent, Buffer, int]],
        views: Sequence[BufferView],
        start: Callable[[list[Transfer]], Ticket],
    ) -> Ticket:
        """From the look at what is in flight to the entry of what is added, nobody else may use these extents."""
        for (extent, _, offset), view in zip(items, views, strict=True):
            self._check_range(kind, extent, offset, view.nbytes)
            self._wait_for_conflicts(kind, extent, offset, offset + view.nbytes)
        transfers = [
            transfer
            for (extent, _, offset), view in zip(items, views, strict=True)
            for transfer in self._transfers(kind, extent, offset, view)
        ]
        try:
            ticket = start(transfers)
            with self._lock:
                for (extent, _, offset), view in zip(items, views, strict=True):
                    self._enter(kind, extent, offset, view.nbytes, ticket)
        except KeyboardInterrupt:
            self._distrust(kind, items)
            raise
        return ticket

    def _distrust(self, kind: Kind, items: Sequence[tuple[Extent, Buffer, int]]) -> None:
        """Nobody knows whether the transfers began: what is in flight may be theirs, and what they write is lost."""
        with self._lock:
            tickets = self.engine._snapshot()
            for extent, _, offset in items:
                extent.pending += [Pending("write", 0, extent.allocated_bytes, t) for t in tickets]
                if kind == "write":
                    extent.written_bytes = min(extent.written_bytes, offset)

    def _check_range(self, kind: Kind, extent: Extent, offset: int, nbytes: int) -> None:
        self._check_open()
        if extent.freed or extent not in self._live:
            raise ValueError("this extent was freed, or belongs to another store")
        end = offset + nbytes
        if offset < 0 or end > extent.nbytes:
            raise ValueError(
                f"bytes [{offset}, {end}) are outside an extent of {extent.nbytes} bytes"
            )
        if kind == "read" and end > extent.written_bytes and nbytes:
            raise ValueError(
                f"bytes [{offset}, {end}) asked of an extent of which {extent.written_bytes} were written"
            )
        if kind == "write" and offset > extent.written_bytes:
            raise ValueError(
                f"a write at {offset} would leave a hole after the {extent.written_bytes} bytes written"
            )

    def _wait_for_conflicts(self, kind: Kind, extent: Extent, begin: int, end: int) -> None:
        """Wait for transfers in flight on the same units, and raise what became of the data that is needed."""
        unit = self.unit_bytes
        first, last = begin // unit * unit, -(-end // unit) * unit
        with self._lock:
            conflicts = [
                p
                for p in extent.pending
                if "write" in (kind, p.kind) and p.begin < last and first < p.end
            ]
        for conflict in conflicts:
            conflict.ticket._finished(None)
        with self._lock:
            self._prune(extent)
        failed = extent.failed
        rewrites = kind == "write" and begin == 0
        if failed is not None and not (rewrites and failed.claimed):
            failed.wait()

    def _transfers(
        self, kind: Kind, extent: Extent, offset: int, view: BufferView
    ) -> list[Transfer]:
        """Map the bytes ``[offset, offset + view.nbytes)`` of the extent to its runs."""
        end = offset + view.nbytes
        # No data of the extent lies behind the end: the rest of the last unit may be overwritten.
        padded = kind == "read" or offset == 0 or end >= extent.written_bytes
        transfers = []
        run_begin = 0
        for run in extent.runs:
            begin, stop = max(offset, run_begin), min(end, run_begin + run.nbytes)
            if begin < stop:
                part = view.part(begin - offset, stop - offset)
                transfers.append(
                    Transfer(
                        kind=kind,
                        file=self._areas[run.area_index].file,
                        offset=run.offset + begin - run_begin,
                        buffer=part,
                        padded=padded,
                    )
                )
            run_begin += run.nbytes
        return transfers

    def _enter(self, kind: Kind, extent: Extent, offset: int, nbytes: int, ticket: Ticket) -> None:
        unit = self.unit_bytes
        extent.pending.append(
            Pending(kind, offset // unit * unit, -(-(offset + nbytes) // unit) * unit, ticket)
        )
        if kind == "read":
            self._read_bytes += nbytes
            return
        self._written_bytes += nbytes
        if offset == 0:
            extent.failed = None
            extent.written_bytes = nbytes
        extent.written_bytes = max(extent.written_bytes, offset + nbytes)

    def _prune(self, extent: Extent) -> None:
        """Forget finished transfers; remember that a write failed, since its bytes must not be read back."""
        for pending in extent.pending:
            has_failed = pending.ticket.done() and pending.ticket.error is not None
            if has_failed and pending.kind == "write":
                extent.failed = pending.ticket
        extent.pending = [p for p in extent.pending if not p.ticket.done()]

    def _collect(self, need: int) -> None:
        """Reuse the space of freed extents whose transfers are over; wait for them when ``need`` asks for it."""
        while self._returned:
            extent = self._returned.popleft()
            self._live.discard(extent)
            self._leaving.append(extent)
        for extent in list(self._leaving):
            self._prune(extent)
            if extent.pending and need > self._available_bytes():
                for pending in extent.pending:
                    pending.ticket._finished(None)
                self._prune(extent)
            if not extent.pending:
                self._leaving.remove(extent)
                for run in extent.runs:
                    self._areas[run.area_index].free.add(run.offset, run.nbytes)

    def _take(self, need: int) -> list[Run]:
        """Take ``need`` bytes: striped over all areas when large, else from the next area that has them."""
        num = len(self._areas)
        striped = need >= self._stripe_bytes * num
        share = -(-need // (num * self.unit_bytes)) * self.unit_bytes if striped else need
        order = [(self._next_area + i) % num for i in range(num)]
        order.sort(key=lambda i: self._areas[i].available_bytes < share)
        self._next_area = (self._next_area + 1) % num
        runs: list[Run] = []
        refused: dict[int, ExtentStoreFull] = {}
        for limit in (share, need):
            for index in order:
                left = need - sum(run.nbytes for run in runs)
                want = min(left, limit, self._areas[index].available_bytes)
                if want == 0 or index in refused:
                    continue
                try:
                    holes = self._areas[index].take(want, self._growth_bytes)
                except ExtentStoreFull as error:
                    refused[index] = error
                    continue
                runs.extend(Run(index, start, nbytes) for start, nbytes in holes)
        if sum(run.nbytes for run in runs) < need:
            for run in runs:
                self._areas[run.area_index].free.add(run.offset, run.nbytes)
            raise next(iter(refused.values()))
        return runs

    def _available_bytes(self) -> int:
        return sum(area.available_bytes for area in self._areas)

    def _in_use_bytes(self) -> int:
        return sum(area.reserved_bytes - area.free.free_bytes for area in self._areas)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the extent store is closed")
        self.engine._check_process()
