"""Tensors on SSD: device -> staging buffer -> extent, and back.

Staging buffers come from a bounded pool: what is on its way is bounded by it, and when it is
full the oldest write is waited for. Reads are started ahead by `prefetch` and land in staging
too. A transfer that failed is raised at the next `poll`, `take` or `store`, never swallowed.

What a stored tensor holds is given back when the graph lets go of it. That may be the garbage
collector's doing, in the middle of anything, also of a method of the pool, the store or the engine
with its lock held: `__del__` here only appends to a queue, which the next `stage` or `poll` works off.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.activations.stored import Label, Stored
from memopt.activations.tensors import flat_elements, nbytes_of
from memopt.io import DiskFull, ExtentStore, ExtentStoreFull, RawBuffer
from memopt.io.engine import fresh
from memopt.memory.pinned import HostBuffer, HostPool
from memopt.types.errors import IoEngineUnavailable

if TYPE_CHECKING:
    from memopt.activations.transfers import Moved


class SpillArea:
    """The extent store of a session and the staging buffers in front of it.

    Args:
        store: extents on one or several directories.
        staging: host buffers; their cap bounds what is on its way to and from the disk.
    """

    def __init__(self, store: ExtentStore, staging: HostPool) -> None:
        self.store = store
        self.staging = staging
        self.full = ""
        """What was full when `alloc` or `stage` last found no room."""
        self._writing: deque[StagedWrite] = deque()
        self._waiter: ThreadPoolExecutor | None = None
        self._dropped: deque[tuple[Any, HostBuffer | None, Any | None]] = deque()
        self._pid = os.getpid()

    def check_process(self) -> None:
        """Raise in a forked child: the threads that read and write stayed with the parent."""
        if os.getpid() != self._pid:
            raise IoEngineUnavailable(
                f"this graph's tensors went to SSD in process {self._pid} and this is a fork of it "
                f"({os.getpid()}), which cannot read them: call backward where forward ran"
            )

    def stage(self, nbytes: int, *, wait: bool = True) -> HostBuffer | None:
        """Return a staging buffer, waiting for the oldest writes while there is none."""
        self.poll()
        while (buffer := self.staging.try_take(nbytes, wait_events=wait)) is None:
            if not wait:
                return None
            if self._writing:
                self._retire(self._writing.popleft())
            elif not self._sweep(wait=True):
                self.full = self.staging.stats().shortage or (
                    f"{nbytes:,} bytes found no room in the {self.staging.cap_bytes:,} bytes of staging memory"
                )
                return None
        return buffer

    def claim(self, nbytes: int) -> tuple[Any, HostBuffer] | None:
        """Return an extent and a staging buffer for one tensor's way out; None without room for both."""
        extent = self.alloc(nbytes)
        if extent is None:
            return None
        buffer = None
        try:
            buffer = self.stage(nbytes)
        finally:
            if buffer is None:
                self.store.free(extent)
        return None if buffer is None else (extent, buffer)

    def alloc(self, nbytes: int) -> Any | None:
        """Return an extent, waiting for those that are about to come back; None without room (see `full`)."""
        self._sweep(wait=False)
        while True:
            try:
                return self.store.alloc(nbytes)
            except ExtentStoreFull as error:
                if not self._sweep(wait=True):
                    self.full = (
                        f"the disk was full ({os.strerror(error.errno or 0)}: {error.filename})"
                        if isinstance(error, DiskFull)
                        else "the ssd budget was full"
                    )
                    return None

    def begin_write(self, extent: Any, buffer: HostBuffer) -> Any:
        """Write a staging buffer out; it returns to the pool when the write is over."""
        ticket = self.store.write(extent, buffer.memoryview)
        self.watch(ticket, buffer)
        return ticket

    def watch(self, ticket: Any, buffer: HostBuffer) -> StagedWrite:
        """Take charge of a write under way and of the buffer that it empties."""
        write = StagedWrite(ticket, buffer)
        self._writing.append(write)
        return write

    def write_after(self, event: Any, extent: Any, buffer: HostBuffer) -> Any:
        """Write a staging buffer out once a CUDA event has passed."""
        self._waiter = self._waiter or ThreadPoolExecutor(1, "memopt-spill")

        def chain() -> None:
            event.synchronize()
            self.store.write(extent, buffer.memoryview).wait()

        ticket = _Chained(self._waiter.submit(chain))
        self.watch(ticket, buffer)
        return ticket

    def drop(
        self, ticket: Any, *, buffer: HostBuffer | None = None, extent: Any | None = None
    ) -> None:
        """Give a staging buffer or an extent back once the transfer `ticket` is over; safe in `__del__`."""
        self._dropped.append((ticket, buffer, extent))

    def poll(self) -> None:
        """Return the buffers of finished writes; raise the first that failed."""
        self._sweep(wait=False)
        while self._writing and self._writing[0].ticket.done():
            self._retire(self._writing.popleft())

    def _sweep(self, *, wait: bool) -> bool:
        """Give back what was dropped and is over, or with `wait` all of it; return whether anything was.

        How a transfer ended that nobody needs any more is not asked: a read that failed lost nothing, and a write is
        among those that `poll` looks at.
        """
        found = False
        for _ in range(len(self._dropped)):
            ticket, buffer, extent = self._dropped.popleft()
            if not (wait or ticket.done()):
                self._dropped.append((ticket, buffer, extent))
                continue
            with contextlib.suppress(OSError):
                ticket.wait()
            found = True
            if buffer is not None:
                buffer.release()
            if extent is not None:
                self.store.free(extent)
        return found

    def finish(self) -> None:
        """Wait for every write."""
        while self._writing:
            self._retire(self._writing.popleft())

    def staging_bytes(self) -> tuple[int, int]:
        """Mapped now and at most."""
        stats = self.staging.stats()
        return stats.mapped_bytes, stats.peak_mapped_bytes

    def extent_bytes(self) -> tuple[int, int]:
        """In use now and at most."""
        stats = self.store.stats()
        return stats.in_use_bytes, stats.peak_bytes

    def close(self) -> None:
        """Wait, then give back files and buffers; raises a write that failed unseen."""
        try:
            try:
                self.finish()
            finally:
                if self._waiter is not None:
                    self._waiter.shutdown(wait=True)
                self._writing.clear()
                self._sweep(wait=True)
                self.store.close()
        finally:
            self.staging.close()

    def _retire(self, write: StagedWrite) -> None:
        """Wait for a write; when it failed, end all that are under way, so that one fault of a disk is one error.

        Nothing is hidden by that: to read an extent whose write failed raises that failure, whenever it is asked for.
        """
        try:
            self._end(write)
        except BaseException:
            while self._writing:
                with contextlib.suppress(OSError):
                    self._end(self._writing.popleft())
            raise

    @staticmethod
    def _end(write: StagedWrite) -> None:
        try:
            write.ticket.wait()
        finally:
            buffer, write.buffer = write.buffer, None
            if buffer is not None:
                buffer.release(write.fetched)


class StagedWrite:
    """A write under way and the buffer it reads from, None when that went back to the pool.

    `fetched` is the event of the last copy to a device that reads the buffer too, or None.
    """

    __slots__ = ("buffer", "fetched", "ticket")

    def __init__(self, ticket: Any, buffer: HostBuffer) -> None:
        self.ticket = ticket
        self.buffer: HostBuffer | None = buffer
        self.fetched: Any = None


class _Chained:
    """A write that waits for a CUDA event first, with the interface of an I/O ticket."""

    __slots__ = ("_future",)

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def done(self) -> bool:
        """Whether it is over, well or badly."""
        return self._future.done()

    def wait(self) -> None:
        """Wait and raise what went wrong."""
        self._future.result()


class SpillStored:
    """One tensor in an extent, stored from and returned to CPU memory."""

    def __init__(self, tensor: Tensor, area: SpillArea, extent: Any, moved: Moved) -> None:
        self.nbytes = self.fetch_bytes = nbytes_of(tensor)
        self._area = area
        self._extent = extent
        self._moved = moved
        self._shape = tensor.shape
        self._stride = tensor.stride()
        self._dtype = tensor.dtype
        self._reading: tuple[Any, HostBuffer] | None = None
        self._home: Tensor | None = None
        self._lost: OSError | None = None

    @classmethod
    def from_cpu(cls, tensor: Tensor, area: SpillArea, label: Label, moved: Moved) -> Stored | None:
        """Copy a CPU tensor to staging and start its write; None when the extents are full."""
        del label
        nbytes = nbytes_of(tensor)
        claimed = area.claim(nbytes)
        if claimed is None:
            return None
        extent, buffer = claimed
        buffer.tensor(tensor.dtype, (tensor.numel(),)).copy_(flat_elements(tensor))
        area.begin_write(extent, buffer)
        moved.ssd_write_bytes += nbytes
        return cls(tensor, area, extent, moved)

    def prefetch(self) -> int:
        """Start the read when a staging buffer is free."""
        if self._extent is None:
            return 0
        self._area.check_process()
        if self._reading is None:
            buffer = self._area.stage(self.nbytes, wait=False)
            if buffer is None:
                return 0
            self._start(buffer)
        return self.nbytes

    def protect(self) -> None:
        """Nothing: the value left when it was stored."""

    def settle(self) -> None:
        """Read the tensor into memory and give its extent back; what cannot be read is raised by `take`."""
        if self._extent is None:
            return
        try:
            self._home = self.take(keep=True)
        except OSError as error:
            self._lost = fresh(error)
        self._free()

    def take(self, *, keep: bool) -> Tensor:
        """Read back into a new tensor of the same shape and strides.

        The extent stays until the graph lets go of this object: another backward through the same
        region may ask again.
        """
        del keep
        begin_s = time.perf_counter()
        try:
            return self._land()
        finally:
            self._moved.waited_on_cpu(begin_s)

    def _land(self) -> Tensor:
        if self._lost is not None:
            raise fresh(self._lost)
        if self._home is not None:
            return self._home.clone()
        self._area.check_process()
        if self._reading is None:
            buffer = self._area.stage(self.nbytes)
            if buffer is None:
                return self._read_directly()
            self._start(buffer)
        assert self._reading is not None
        ticket, buffer = self._reading
        self._reading = None
        try:
            ticket.wait()
            tensor = torch.empty_strided(self._shape, self._stride, dtype=self._dtype)
            flat_elements(tensor).copy_(buffer.tensor(self._dtype, (math.prod(self._shape),)))
        finally:
            buffer.release()
        return tensor

    def _read_directly(self) -> Tensor:
        """Read into the tensor itself, where staging is all taken by reads ahead."""
        tensor = torch.empty_strided(self._shape, self._stride, dtype=self._dtype)
        memory = RawBuffer(address=tensor.data_ptr(), nbytes=self.nbytes, owner=tensor)
        self._area.store.read(self._extent, memory).wait()
        self._moved.ssd_read_bytes += self.nbytes
        return tensor

    def _start(self, buffer: HostBuffer) -> None:
        ticket = self._area.store.read(self._extent, buffer.memoryview)
        self._reading = (ticket, buffer)
        self._moved.ssd_read_bytes += self.nbytes

    def _free(self) -> None:
        if self._extent is not None:
            extent, self._extent = self._extent, None
            self._area.store.free(extent)

    def __del__(self) -> None:
        """Give the extent back when the graph that needed it is gone."""
        if self._reading is not None:
            ticket, buffer = self._reading
            self._reading = None
            self._area.drop(ticket, buffer=buffer)
        self._free()
