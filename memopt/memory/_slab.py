"""One anonymous memory mapping: faulted in completely, page-locked in place, sub-divided into buffers.

The order matters. ``cudaHostRegister`` on pages that were never touched faults them in one by one inside the call,
under a lock that stalls every other CUDA call of the process; on pages that are there it only pins them. Advising huge
pages speeds the faults up but touches nothing, so every page is populated either way (``MADV_POPULATE_WRITE``, Linux
5.14, or a write to each where the kernel is older).

The mapping is private. Python's own default, ``MAP_SHARED``, is shared memory of the kernel's (tmpfs): it takes no
advice for huge pages unless the administrator allows that apart (``shmem_enabled``), and advice to drop pages only
hides them. On a 2-core virtual machine faulting in 1 GiB of it took 0.60 s of CPU time, private pages 0.33, private
huge pages 0.05; unmapping it, which Python does under its lock, 0.22 s instead of nothing.

A slab is not inherited by forked children (``MADV_DONTFORK``): the kernel would copy pinned pages at every fork, and a
data loader's workers have no use for them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from typing import Any

__all__ = ["PAGE_BYTES", "Slab"]

PAGE_BYTES = mmap.PAGESIZE
_MADV_POPULATE_WRITE = 23
_POPULATE_BYTES = 4 << 20
"""Of one call: the kernel holds the process's memory map for it, and every mmap of the program's own (Python's, the
driver's at each new segment of device memory) waits. Beside two threads that fault in memory which a virtual machine
had not touched before, an mmap of 1 MiB took 636 ms at the median with calls of 64 MiB, 8 with calls of 4."""
_DISCARD_BYTES = 64 << 20
_libc: Any = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Slab:
    """``nbytes`` (a multiple of the page size) of host memory. ``base`` is its place in the pool's list of holes.

    Raises:
        OSError: the system refuses the mapping (errno ENOMEM).
    """

    def __init__(self, nbytes: int, base: int, *, huge_pages: bool) -> None:
        assert nbytes > 0, nbytes
        assert nbytes % PAGE_BYTES == 0, nbytes
        self.nbytes = nbytes
        self.base = base
        self.is_locked = False
        self.memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        with contextlib.suppress(
            OSError
        ):  # both are advice: kernels without it lose nothing but speed
            self.memory.madvise(mmap.MADV_DONTFORK)
        if huge_pages:
            with contextlib.suppress(OSError):
                self.memory.madvise(mmap.MADV_HUGEPAGE)

    def populate(self, begin: int, end: int) -> None:
        """Fault in the pages of ``[begin, end)``, without Python's lock.

        Raises:
            MemoryError: the system has no memory for them.
        """
        for start in range(begin, end, _POPULATE_BYTES):
            nbytes = min(_POPULATE_BYTES, end - start)
            if _libc.madvise(self.address + start, nbytes, _MADV_POPULATE_WRITE) == 0:
                continue
            code = ctypes.get_errno()
            if code != errno.EINVAL:  # EINVAL: a kernel that does not know the advice
                raise MemoryError(f"faulting in {nbytes} bytes of host memory: {os.strerror(code)}")
            ctypes.memset(self.address + start, 0, nbytes)

    def discard(self) -> None:
        """Give the pages back to the system, without Python's lock; nobody may need their bytes.

        Unmapping then has little left to do: Python holds its lock for that.
        """
        for begin in range(0, self.nbytes, _DISCARD_BYTES):
            nbytes = min(_DISCARD_BYTES, self.nbytes - begin)
            _libc.madvise(self.address + begin, nbytes, mmap.MADV_DONTNEED)

    def view(self, begin: int, nbytes: int) -> memoryview:
        """Return the writable bytes ``[begin, begin + nbytes)``; the view keeps the mapping alive."""
        return memoryview(self.memory)[begin : begin + nbytes]
