"""What a host pool hands out, and what it says of itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from memopt.memory._slab import Slab
from memopt.memory._trimmer import Trims
from memopt.types.errors import MemoptError

__all__ = ["HostBuffer", "HostPoolFull", "HostPoolStats"]


class HostPoolFull(MemoptError):  # noqa: N818 - the name says what is the matter
    """The cap of a host pool, or the system, leaves no room for a buffer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostPoolStats:
    """Bytes of a pool. ``asked`` is what callers wanted, ``in_use`` that in whole pages, ``mapped`` what slabs hold.

    ``waste_bytes`` is what was mapped at the peak and never asked for at the same time. ``populate_s`` and ``lock_s``
    add up the time of the threads that faulted pages in and registered them. ``trims`` is what left in the background.
    ``shortage`` says what the system refused, if anything: the pool does not grow past it.
    """

    cap_bytes: int
    mapped_bytes: int
    locked_bytes: int
    in_use_bytes: int
    asked_bytes: int
    peak_mapped_bytes: int
    peak_in_use_bytes: int
    peak_asked_bytes: int
    waste_bytes: int
    populate_s: float
    lock_s: float
    num_slabs: int
    num_buffers: int
    unlocked_reason: str
    shortage: str
    trims: Trims


class Lender(Protocol):
    """Where a buffer goes back to."""

    def _give_back(self, buffer: HostBuffer, event: Any) -> None: ...


class HostBuffer:
    """``nbytes`` of page-aligned host memory on loan from a host pool; give it back with :meth:`release`."""

    __slots__ = ("_base", "_pool", "_slab", "address", "memoryview", "nbytes")

    def __init__(self, pool: Lender, slab: Slab, base: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self.address = slab.address + base - slab.base
        self.memoryview = slab.view(base - slab.base, nbytes)
        """The bytes, writable; it keeps the memory (not the registration) alive."""
        self._pool: Lender | None = pool
        self._slab = slab
        self._base = base

    @property
    def is_locked(self) -> bool:
        """Whether the memory is page-locked, so that copies to and from the device are asynchronous."""
        return self._slab.is_locked

    def tensor(self, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """Return a contiguous tensor over the first bytes of the buffer.

        Raises:
            ValueError: the tensor needs more than ``nbytes``.
        """
        needed = math.prod(shape) * dtype.itemsize
        if needed > self.nbytes:
            raise ValueError(
                f"a tensor {tuple(shape)} of {dtype} needs {needed} bytes, the buffer has {self.nbytes}"
            )
        if needed == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        flat = torch.frombuffer(self.memoryview, dtype=torch.uint8, count=needed)
        return flat.view(dtype).view(tuple(shape))

    def release(self, event: Any = None) -> None:
        """Give the buffer back. It is handed out again when ``event`` (``query``, ``synchronize``) has passed.

        Raises:
            ValueError: it was given back before.
        """
        pool, self._pool = self._pool, None
        if pool is None:
            raise ValueError(f"this buffer of {self.nbytes} bytes was released before")
        pool._give_back(self, event)
