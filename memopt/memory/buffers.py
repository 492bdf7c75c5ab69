"""Host buffers of exact size: anonymous mmap, every page touched by threads, then page-locked.

`pin_memory=True` rounds a block up to the next power of two and locks pages that were never
touched, which takes ten times as long inside a call that stalls every other CUDA call. Here pages
are faulted in first, by several threads outside Python's lock, then registered in place. Buffers
are reused by size; the cap counts what is mapped. Unregistering comes before unmapping, always:
CUDA fails at its next call otherwise.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

PAGE_BYTES = 4096
_MADV_POPULATE_WRITE = 23
_NUM_THREADS = 4
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class HostBuffer:
    """One page-aligned block of host memory.

    Args:
        nbytes: usable bytes; the mapping is rounded up to whole pages.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.mapped_bytes = -(-nbytes // PAGE_BYTES) * PAGE_BYTES
        self._map = mmap.mmap(-1, self.mapped_bytes)
        self.bytes_tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        self.address = self.bytes_tensor.data_ptr()
        self.registered = False
        self.ready_event: Any = None

    def tensor(self, dtype: torch.dtype, numel: int) -> Tensor:
        """Return the first `numel` elements of the block as a one-dimensional tensor."""
        nbytes = numel * torch.empty(0, dtype=dtype).element_size()
        return self.bytes_tensor[:nbytes].view(dtype)

    def memory(self, nbytes: int) -> memoryview:
        """Return the first `nbytes` bytes as a writable memoryview."""
        return memoryview(self._map)[:nbytes]

    def fault_in(self) -> None:
        """Touch every page; outside Python's lock where the kernel can do it (5.14)."""
        if _LIBC.madvise(self.address, self.mapped_bytes, _MADV_POPULATE_WRITE) != 0:
            self.bytes_tensor[::PAGE_BYTES].zero_()


class HostBuffers:
    """A pool of `HostBuffer`s under a cap.

    Args:
        cap_bytes: at most this much is mapped.
        register: page-lock the blocks with CUDA.
    """

    def __init__(self, cap_bytes: int, *, register: bool) -> None:
        self.cap_bytes = cap_bytes
        self.mapped_bytes = 0
        self.in_use_bytes = 0
        self.peak_in_use_bytes = 0
        self.peak_mapped_bytes = 0
        self.unlocked_reason = "" if register else "not asked for"
        self._register = register
        self._free: dict[int, list[HostBuffer]] = {}
        self._all: list[HostBuffer] = []
        self._pending: dict[int, int] = {}
        self._changed = threading.Condition()
        self._executor: ThreadPoolExecutor | None = None
        self._closed = False

    def take(self, nbytes: int) -> HostBuffer | None:
        """Return a block of `nbytes`, or None when the cap leaves no room for it."""
        key = -(-nbytes // PAGE_BYTES) * PAGE_BYTES
        with self._changed:
            buffer = self._find(key)
            if buffer is None:
                self._make_room(key)
                if self.mapped_bytes + key > self.cap_bytes:
                    return None
                self._grow(key)
        if buffer is None:
            buffer = self._create(key)
        with self._changed:
            self.in_use_bytes += key
            self.peak_in_use_bytes = max(self.peak_in_use_bytes, self.in_use_bytes)
        if buffer.ready_event is not None:
            buffer.ready_event.synchronize()
            buffer.ready_event = None
        return buffer

    def _find(self, key: int) -> HostBuffer | None:
        """Return a free block: one whose event has passed first, else one still on its way."""
        while True:
            blocks = self._free.get(key, [])
            for index, block in enumerate(blocks):
                if block.ready_event is None or block.ready_event.query():
                    return blocks.pop(index)
            if self._pending.get(key, 0) == 0:
                break
            self._changed.wait()
        if blocks and self.mapped_bytes + key > self.cap_bytes:
            return blocks.pop(0)
        return None

    def release(self, buffer: HostBuffer, event: Any = None) -> None:
        """Give a block back; it is handed out again once `event` (a CUDA event) has passed."""
        buffer.ready_event = event
        with self._changed:
            self.in_use_bytes -= buffer.mapped_bytes
            if not self._closed:
                self._free.setdefault(buffer.mapped_bytes, []).append(buffer)
                return
        self._destroy(buffer)

    def reserve(self, sizes: dict[int, int]) -> None:
        """Create blocks in the background: `sizes` maps bytes to how many are wanted at once."""
        self._executor = self._executor or ThreadPoolExecutor(_NUM_THREADS, "memopt-pin")
        wanted: list[int] = []
        with self._changed:
            for nbytes, count in sizes.items():
                key = -(-nbytes // PAGE_BYTES) * PAGE_BYTES
                have = sum(1 for b in self._all if b.mapped_bytes == key)
                for _ in range(count - have):
                    if self.mapped_bytes + key > self.cap_bytes:
                        break
                    self._grow(key)
                    self._pending[key] = self._pending.get(key, 0) + 1
                    wanted.append(key)
        for key in wanted:
            self._executor.submit(self._create_free, key)

    def settle(self) -> None:
        """Wait until every reserved block exists."""
        if self._executor is not None:
            self._executor.shutdown(wait=True)
            self._executor = None

    def close(self) -> None:
        """Free every block that is not in use; those in use are freed when they come back."""
        self.settle()
        with self._changed:
            self._closed = True
            free = [b for blocks in self._free.values() for b in blocks]
            self._free.clear()
        for buffer in free:
            self._destroy(buffer)

    def _make_room(self, key: int) -> None:
        """Free idle blocks of other sizes, largest first, until `key` fits under the cap."""
        for size in sorted(self._free, reverse=True):
            blocks = self._free[size]
            while blocks and self.mapped_bytes + key > self.cap_bytes:
                self._destroy(blocks.pop())

    def _grow(self, key: int) -> None:
        self.mapped_bytes += key
        self.peak_mapped_bytes = max(self.peak_mapped_bytes, self.mapped_bytes)

    def _create_free(self, key: int) -> None:
        try:
            buffer = self._create(key)
        except BaseException:
            with self._changed:
                self._pending[key] -= 1
                self.mapped_bytes -= key
                self._changed.notify_all()
            raise
        with self._changed:
            self._pending[key] -= 1
            self._free.setdefault(key, []).append(buffer)
            self._changed.notify_all()

    def _create(self, key: int) -> HostBuffer:
        buffer = HostBuffer(key)
        buffer.fault_in()
        if self._register and not self.unlocked_reason:
            error = int(torch.cuda.cudart().cudaHostRegister(buffer.address, key, 0))
            if error:
                torch.cuda.cudart().cudaGetLastError()
                self.unlocked_reason = f"cudaHostRegister failed with CUDA error {error}"
            buffer.registered = not error
        with self._changed:
            self._all.append(buffer)
        return buffer

    def _destroy(self, buffer: HostBuffer) -> None:
        if buffer.ready_event is not None:
            buffer.ready_event.synchronize()
        if buffer.registered:
            torch.cuda.cudart().cudaHostUnregister(buffer.address)
            buffer.registered = False
        self.mapped_bytes -= buffer.mapped_bytes
        self._all.remove(buffer)
