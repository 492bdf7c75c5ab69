"""Buffers as the storage engines see them: an address, a length, and something that keeps both valid.

A caller hands over any contiguous object of the buffer protocol (``bytes``, ``bytearray``, ``mmap``, ``memoryview``,
NumPy arrays, a pinned buffer's view) or a :class:`RawBuffer` for memory that only has an address. The engine turns
either into a :class:`BufferView` and holds that view until the last byte was transferred, so a caller may drop its own
reference at once.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["BounceBlock", "BouncePool", "Buffer", "BufferView", "RawBuffer", "view_of"]

Buffer = Any
"""A contiguous object of the buffer protocol, or a :class:`RawBuffer` (Python 3.10 has no type for the former)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RawBuffer:
    """``nbytes`` bytes of writable memory at ``address``; ``owner`` is kept alive while a transfer uses it."""

    address: int
    nbytes: int
    owner: object = None


@dataclass(frozen=True, slots=True)
class BufferView:
    """A flat view of bytes: ``view`` for system calls made from Python, ``address`` for native code."""

    address: int
    nbytes: int
    view: memoryview
    owner: object

    def part(self, start: int, stop: int) -> BufferView:
        """Return the bytes ``[start, stop)`` of this view; shares memory and owner."""
        return BufferView(self.address + start, stop - start, self.view[start:stop], self.owner)


def view_of(buffer: Buffer, *, writable: bool) -> BufferView:
    """Return a flat view of ``buffer``.

    Raises:
        ValueError: the buffer is not contiguous, or is read-only and ``writable`` is asked for.
        TypeError: the object has no buffer protocol.
    """
    if isinstance(buffer, BufferView):
        view = buffer.view
    elif isinstance(buffer, RawBuffer):
        return _view_of_raw(buffer)
    else:
        view = memoryview(buffer)
    if not view.c_contiguous:
        raise ValueError(
            f"the buffer is not contiguous (shape {view.shape}, strides {view.strides}); pass a contiguous copy"
        )
    if writable and view.readonly:
        raise ValueError(
            "the buffer is read-only, and a read from storage would write to it; pass a writable one (bytearray)"
        )
    if isinstance(buffer, BufferView):
        return buffer
    if view.nbytes == 0:
        return BufferView(0, 0, memoryview(b""), buffer)
    flat = view.cast("B") if (view.format != "B" or view.ndim != 1) else view
    array = np.frombuffer(flat, dtype=np.uint8)
    return BufferView(int(array.__array_interface__["data"][0]), flat.nbytes, flat, buffer)


def _view_of_raw(buffer: RawBuffer) -> BufferView:
    if buffer.nbytes < 0 or (buffer.nbytes > 0 and buffer.address <= 0):
        raise ValueError(
            f"RawBuffer(address={buffer.address:#x}, nbytes={buffer.nbytes}) does not describe memory"
        )
    if buffer.nbytes == 0:
        return BufferView(0, 0, memoryview(b""), buffer)
    view = memoryview((ctypes.c_ubyte * buffer.nbytes).from_address(buffer.address)).cast("B")
    return BufferView(buffer.address, buffer.nbytes, view, buffer.owner)


@dataclass(frozen=True, slots=True)
class BounceBlock:
    """One page-aligned block that carries the last, incomplete unit of a direct transfer."""

    view: BufferView
    index: int


class BouncePool:
    """Page-aligned blocks of ``block_bytes`` for the odd ends of direct transfers; grows, never shrinks; thread-safe.

    The blocks come from anonymous memory mappings of ``blocks_per_slab`` blocks, so each is page-aligned and the pool
    costs a few pages. At most one block is in use per transfer in flight.
    """

    def __init__(self, block_bytes: int, *, blocks_per_slab: int = 64) -> None:
        if block_bytes <= 0 or block_bytes % mmap.PAGESIZE:
            raise ValueError(
                f"block_bytes={block_bytes} must be a positive multiple of the page size {mmap.PAGESIZE}"
            )
        self.block_bytes = block_bytes
        self._blocks_per_slab = blocks_per_slab
        self._lock = threading.Lock()
        self._blocks: list[BounceBlock] = []
        self._free: list[BounceBlock] = []

    def take(self) -> BounceBlock:
        """Return a free block, allocating a slab when there is none."""
        with self._lock:
            if not self._free:
                self._grow()
            return self._free.pop()

    def give(self, block: BounceBlock) -> None:
        """Take ``block`` back."""
        with self._lock:
            self._free.append(block)

    @property
    def num_in_use(self) -> int:
        """Blocks that are handed out now."""
        with self._lock:
            return len(self._blocks) - len(self._free)

    def _grow(self) -> None:
        slab = view_of(mmap.mmap(-1, self.block_bytes * self._blocks_per_slab), writable=True)
        for i in range(self._blocks_per_slab):
            part = slab.part(i * self.block_bytes, (i + 1) * self.block_bytes)
            block = BounceBlock(part, len(self._blocks))
            self._blocks.append(block)
            self._free.append(block)
