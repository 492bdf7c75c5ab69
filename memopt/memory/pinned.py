"""A pool of page-locked host memory with exact sizes.

``pin_memory=True`` goes through PyTorch's caching host allocator: each block is rounded up to a power of two and locked
by a call that faults its pages in one after the other. MemAscend (arXiv 2505.23254) names that rounding, and pool slots
as large as the largest tensor, as what ends SSD-offloaded training first. Here memory comes in slabs of the exact sum
of what is asked: several threads fault every page in, one registers the slab in place (256 MiB per call, so that
other CUDA calls are never stalled for long), and buffers are cut from the slabs by best fit and come back to them, so
the same bytes serve every step. With :meth:`HostPool.reserve` a plan's sizes are locked in the background, beside the
first step.

Registered memory is invisible to PyTorch's allocator, so nothing but the pool protects it: a buffer is given back with
the event of the last copy that uses it, and is not handed out before that event has passed. A slab is unregistered
before its memory is freed; the next CUDA call would fail otherwise.

Where page-locking is refused (limits, cgroup, WSL) the CUDA error is cleared, the pool goes on with plain memory, and
``stats().unlocked_reason`` says why. Where the system refuses the memory itself, that is as if the cap were lower
(``stats().shortage``): a program that can do without a buffer goes on. Without CUDA the same pool gives plain buffers
for SSD staging. Page alignment (4096) serves O_DIRECT and CUDA alike.
"""

from __future__ import annotations

import bisect
import os
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from memopt.memory._buffer import HostBuffer, HostPoolFull, HostPoolStats
from memopt.memory._builder import SlabBuilder, unlock, unlock_all
from memopt.memory._cudart import Cudart, load_cudart
from memopt.memory._packing import packed, unneeded
from memopt.memory._returns import Returns
from memopt.memory._slab import PAGE_BYTES, Slab
from memopt.memory._trimmer import SlabTrimmer
from memopt.types.free_list import FreeList

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["HostBuffer", "HostPool", "HostPoolFull", "HostPoolStats"]


@dataclass(frozen=True, slots=True)
class _Cooling:
    """A buffer that came back while ``event`` was still to pass."""

    event: Any
    base: int
    nbytes: int


class HostPool:
    """Page-aligned host buffers of exact size under a hard cap. Thread-safe.

    Args:
        cap_bytes: at most this much is mapped.
        register: page-lock the memory with CUDA; without CUDA this is noted and the buffers are plain.
        num_threads: threads that fault pages in and register them. More than four is no faster and stalls the
            program's own CUDA calls: on an H200's host 8 GiB took 1.9 s with 4 threads, 3.1 with 12.
        chunk_bytes: reserved slabs are at most this large (a larger buffer has its own). A call that registers one
            holds up other CUDA calls: 85 ms at worst with 256 MiB there, 210 ms with 1 GiB.
        growth_bytes: a buffer that was not reserved and is smaller than this shares a slab of this size.
        huge_pages: ask for transparent huge pages; every page is touched either way.
        cudart: replaces the CUDA runtime, for tests.

    Raises:
        ValueError: ``cap_bytes`` is below one page.
    """

    def __init__(
        self,
        cap_bytes: int,
        register: bool,
        *,
        num_threads: int = 4,
        chunk_bytes: int = 256 << 20,
        growth_bytes: int = 16 << 20,
        huge_pages: bool = True,
        cudart: Cudart | None = None,
    ) -> None:
        if cap_bytes < PAGE_BYTES:
            raise ValueError(f"cap_bytes={cap_bytes} is below one page of {PAGE_BYTES} bytes")
        self.cap_bytes = cap_bytes // PAGE_BYTES * PAGE_BYTES
        self._chunk_bytes = _whole_pages(chunk_bytes)
        self._growth_bytes = _whole_pages(growth_bytes)
        self._huge_pages = huge_pages
        self._lock = threading.Lock()
        self._returns = Returns(self._lock, self._take_back)
        self._changed = self._returns.changed
        self._free = FreeList()
        self._slabs: list[Slab] = []
        self._next_base = PAGE_BYTES
        self._cooling: list[_Cooling] = []
        self._building: list[Slab] = []
        self._error: BaseException | None = None
        self._limit_bytes = self.cap_bytes
        self._shortage = ""
        self._mapped = self._in_use = self._asked = self._num_buffers = 0
        self._peak_mapped = self._peak_in_use = self._peak_asked = 0
        self._closed = False
        self._cudart, reason = cudart, ""
        if not register:
            self._cudart, reason = None, "page-locking was not asked for"
        elif cudart is None:
            index = torch.cuda.current_device() if torch.cuda.is_available() else 0
            self._cudart, reason = load_cudart(index)
        self._builder = SlabBuilder(num_threads, self._cudart, reason)
        self._trimmer = SlabTrimmer(self._cudart, self._slab_is_gone)
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(self, unlock_all, self._slabs, self._cudart, self._pid)

    def take(self, nbytes: int) -> HostBuffer:
        """Return a buffer of ``nbytes``; waits for slabs being locked and for buffers whose event is about to pass.

        Raises:
            ValueError: ``nbytes`` is negative, the pool is closed, or this is a fork of the process that made it.
            HostPoolFull: the cap, or the system, leaves no room; the message says which.
        """
        buffer = self.try_take(nbytes)
        if buffer is None:
            text = f"{nbytes} bytes asked of a host pool of {self.cap_bytes}, of which {self._in_use} are in use; "
            if self._shortage:
                raise HostPoolFull(f"{text}{self._shortage}")
            raise HostPoolFull(f"{text}release buffers first, or raise the host budget")
        return buffer

    def try_take(
        self, nbytes: int, *, wait: bool = True, wait_events: bool = True
    ) -> HostBuffer | None:
        """As :meth:`take`, but return None when the cap, or the system, leaves no room.

        Or, without ``wait``, where memory is still being locked; without ``wait_events``, where events are to pass.
        """
        if nbytes < 0:
            raise ValueError(f"nbytes={nbytes} is negative")
        size = max(_whole_pages(nbytes), PAGE_BYTES)
        self._check_process()
        with self._returns, self._lock:
            while True:
                self._check_open()
                self._reap()
                base = self._free.take(size)
                if base is not None:
                    return self._hand_out(base, size, nbytes)
                if self._building:
                    if not wait:
                        self._raise_error()
                        return None
                    with self._builder.hurry():
                        self._changed.wait()
                    self._raise_error()
                elif self._call_back():
                    continue
                elif self._make_room(size):
                    room = 0 if self._shortage else self._limit_bytes - self._mapped
                    self._build([max(size, min(self._growth_bytes, room))])
                elif self._trimmer.is_busy and wait:
                    self._changed.wait()
                elif self._cooling and wait_events:
                    self._wait_for(self._cooling[0])
                else:
                    return None

    def reserve(self, sizes: Mapping[int, int]) -> int:
        """Start locking memory for ``sizes[nbytes]`` buffers of each size at once, in the background.

        Memory that is mapped already counts. Returns the bytes that the cap, or the system, leaves out (0: everything
        fits, as far as is known before it is faulted in).
        """
        self._check_process()
        blocks = sorted(
            (_whole_pages(n) for n, count in sizes.items() for _ in range(count) if n), reverse=True
        )
        with self._returns, self._lock:
            self._check_open()
            self._call_back()
            old = [slab.nbytes for slab in (*self._slabs, *self._building)]
            room = self._limit_bytes - self._mapped
            new, left_out = packed(blocks, old, room, self._chunk_bytes)
            return left_out + self._build(new)

    def trim(self) -> int:
        """Free every slab that no buffer uses; return the bytes that this gives back."""
        with self._returns, self._lock:
            self._reap()
            self._call_back()
            idle = [s for s in self._slabs if self._is_idle(s)]
            for slab in idle:
                self._drop(slab)
        return sum(slab.nbytes for slab in idle)

    def trim_beside(self, sizes: Mapping[int, int]) -> int:
        """Free, in the background, idle slabs that ``sizes[nbytes]`` buffers of each size do not need.

        They are not handed out any more, but count as mapped until they are gone; a buffer that finds no other room
        calls back those whose turn has not come. Returns their bytes.
        """
        self._check_process()
        blocks = [_whole_pages(n) for n, count in sizes.items() for _ in range(count) if n]
        with self._returns, self._lock:
            self._check_open()
            self._reap()
            idle = [s for s in self._slabs if self._is_idle(s)]
            busy = [s for s in (*self._slabs, *self._building) if s not in idle]
            leaving = unneeded(busy, idle, blocks, self._chunk_bytes)
            for slab in leaving:
                self._free.take_hole(slab.base)
                self._slabs.remove(slab)
            self._trimmer.start(leaving)
        return sum(slab.nbytes for slab in leaving)

    @property
    def is_locking(self) -> bool:
        """Whether memory is being locked in the background."""
        with self._returns, self._lock:
            return bool(self._building)

    def settle(self, at_most_s: float | None = None) -> bool:
        """Wait for what is being locked, at most so many seconds; return whether that is over.

        What the system has no memory for is not waited for (``stats().shortage``).
        """
        self._check_process()
        with self._returns, self._lock:
            with self._builder.hurry():
                self._changed.wait_for(lambda: not self._building, at_most_s)
            self._raise_error()
            return not self._building

    def stats(self) -> HostPoolStats:
        """Return the levels now, the peaks, and the time that faulting and locking took."""
        with self._returns, self._lock:
            self._reap()
            return HostPoolStats(
                cap_bytes=self.cap_bytes,
                mapped_bytes=self._mapped,
                locked_bytes=sum(slab.nbytes for slab in self._slabs if slab.is_locked)
                + self._trimmer.locked_bytes,
                in_use_bytes=self._in_use,
                asked_bytes=self._asked,
                peak_mapped_bytes=self._peak_mapped,
                peak_in_use_bytes=self._peak_in_use,
                peak_asked_bytes=self._peak_asked,
                waste_bytes=self._peak_mapped - self._peak_asked,
                populate_s=self._builder.populate_s,
                lock_s=self._builder.lock_s,
                num_slabs=len(self._slabs),
                num_buffers=self._num_buffers,
                unlocked_reason=self._builder.unlocked_reason,
                shortage=self._shortage,
                trims=self._trimmer.trims,
            )

    def close(self) -> None:
        """Wait for events and the device, unlock and free everything; tensors still held become pageable.

        Safe to call twice, and again after a KeyboardInterrupt in here: the second call does what the first one left.
        A forked child has neither the memory nor the threads.
        """
        if os.getpid() != self._pid:
            self._closed = True
            return
        self._builder.abandon()
        with self._returns, self._lock:
            self._call_back()
            with self._builder.hurry():
                while self._building or self._trimmer.is_busy:
                    self._changed.wait()
            self._returns.enter_all()
            self._closed = True
            cooling = list(self._cooling)
        for block in cooling:
            block.event.synchronize()
        self._builder.stop()
        self._trimmer.stop()
        with self._returns, self._lock:
            self._mapped = 0
            self._cooling.clear()
            unlock_all(self._slabs, self._cudart, self._pid)
            self._finalizer.detach()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the host pool is closed")

    def _check_process(self) -> None:
        """Whether the lock is held for ever and the threads are missing: asked before the lock is."""
        if os.getpid() != self._pid:
            raise ValueError(
                f"this host pool was made in process {self._pid} and this is a fork of it, {os.getpid()}, "
                "which has neither its memory nor its threads: make a pool of its own"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------- handing out, taking back

    def _hand_out(self, base: int, size: int, nbytes: int) -> HostBuffer:
        self._in_use += size
        self._asked += nbytes
        self._num_buffers += 1
        self._peak_in_use = max(self._peak_in_use, self._in_use)
        self._peak_asked = max(self._peak_asked, self._asked)
        slab = self._slabs[bisect.bisect_right(self._slabs, base, key=lambda slab: slab.base) - 1]
        return HostBuffer(self, slab, base, nbytes)

    def _give_back(self, buffer: HostBuffer, event: Any) -> None:
        """Take a buffer back, from anywhere: a ``__del__`` may run inside of any method here, on its thread."""
        self._returns.give((buffer._base, buffer.nbytes, event))

    def _take_back(self, returned: tuple[int, int, Any]) -> None:
        base, nbytes, event = returned
        size = max(_whole_pages(nbytes), PAGE_BYTES)
        self._in_use -= size
        self._asked -= nbytes
        self._num_buffers -= 1
        if self._closed:
            return
        if event is None:
            self._free.add(base, size)
        else:
            self._cooling.append(_Cooling(event, base, size))

    def _reap(self) -> None:
        """Make the buffers whose event has passed available; after some that have not, the rest is not asked."""
        self._returns.enter_all()
        still: list[_Cooling] = []
        for i, block in enumerate(self._cooling):
            if block.event.query():
                self._free.add(block.base, block.nbytes)
            else:
                still.append(block)
            if len(still) == 16:
                still += self._cooling[i + 1 :]
                break
        self._cooling = still

    def _wait_for(self, block: _Cooling) -> None:
        """Wait for one event without holding up the pool's other users."""
        self._changed.release()
        try:
            block.event.synchronize()
        finally:
            self._changed.acquire()

    # ------------------------------------------------------------------------------------------------- slabs

    def _make_room(self, size: int) -> bool:
        """Free wholly idle slabs, the largest first, until ``size`` fits under the cap."""
        idle = [slab for slab in self._slabs if self._is_idle(slab)]
        idle.sort(key=lambda slab: slab.nbytes)
        if self._limit_bytes - self._mapped + sum(slab.nbytes for slab in idle) < size:
            return False
        while self._limit_bytes - self._mapped < size:
            self._drop(idle.pop())
        return True

    def _drop(self, slab: Slab) -> None:
        """Unlock and free a slab that is one whole hole."""
        self._free.take_hole(slab.base)
        self._slabs.remove(slab)
        self._mapped -= slab.nbytes
        unlock(slab, self._cudart)

    def _build(self, sizes: list[int]) -> int:
        """Start mapping, faulting in and locking slabs of ``sizes``; they count at once, so the cap holds.

        Returns the bytes that the system refuses to map.
        """
        for i, size in enumerate(sizes):
            base, mapped = self._next_base, self._mapped
            self._next_base += size + PAGE_BYTES  # the gap keeps holes of neighbouring slabs apart
            try:
                slab = Slab(size, base, huge_pages=self._huge_pages)
                self._mapped += size
                self._building.append(slab)
                self._builder.start(slab, self._slab_is_built)
            except BaseException as error:
                self._building = [s for s in self._building if s.base != base]  # nobody may wait
                self._mapped = mapped
                if not isinstance(error, (OSError, RuntimeError)):  # no memory, no threads
                    raise
                self._fall_short(size, error)
                return sum(sizes[i:])
            self._peak_mapped = max(self._peak_mapped, self._mapped)
        return 0

    def _fall_short(self, nbytes: int, error: Exception) -> None:
        """The system refused ``nbytes`` more: from now on so much is beyond the cap, and is not asked for again."""
        self._limit_bytes = min(self._limit_bytes, self._mapped + nbytes - PAGE_BYTES)
        if not self._shortage:
            self._shortage = f"the system refused {nbytes} bytes of host memory: {error}"

    def _is_idle(self, slab: Slab) -> bool:
        return self._free.hole_at(slab.base) == slab.nbytes

    def _call_back(self) -> bool:
        """Take slabs back that wait for their trimming; return whether there were any."""
        slabs = self._trimmer.call_back()
        for slab in slabs:
            self._add(slab)
        return bool(slabs)

    def _add(self, slab: Slab) -> None:
        bisect.insort(self._slabs, slab, key=lambda slab: slab.base)
        self._free.add(slab.base, slab.nbytes)

    def _slab_is_gone(self, slab: Slab) -> None:
        with self._returns, self._lock:
            self._mapped -= slab.nbytes
            self._trimmer.is_busy = False
            self._changed.notify_all()

    def _slab_is_built(self, slab: Slab, error: BaseException | None) -> None:
        with self._returns, self._lock:
            if slab not in self._building:  # its start was interrupted
                unlock(slab, self._cudart)
                return
            if error is None:
                self._add(slab)
            else:
                self._mapped -= slab.nbytes
                if isinstance(error, MemoryError):
                    self._fall_short(slab.nbytes, error)
                else:
                    self._error = self._error or error
            self._building.remove(slab)
            self._changed.notify_all()

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES
