"""A thread that unlocks and unmaps slabs, one by one, beside the program's own work.

Unregistering a slab may hold up the program's CUDA calls as registering one does (85 ms for 256 MiB on an H200's host,
see :class:`HostPool`), so there is a pause after each, four times as long as it took. Neither the pool's lock nor
Python's is held meanwhile: ctypes lets go of the latter around the call, and the pages go by ``madvise`` before the
mapping does. A slab that is in the thread's queue belongs to nobody else; until its turn comes the pool may call it
back.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from memopt.memory._builder import unlock
from memopt.memory._cudart import Cudart
from memopt.memory._slab import Slab

__all__ = ["SlabTrimmer", "Trims"]

_LEAST_PAUSE_S = 0.02
_PAUSE_FACTOR = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Trims:
    """What left in the background so far: slabs, their bytes, and the time it took in all and at worst for one."""

    num_slabs: int = 0
    size_bytes: int = 0
    total_s: float = 0.0
    longest_s: float = 0.0


class SlabTrimmer:
    """Unlocks and unmaps slabs in a thread that lives as long as there are any.

    Everything but the thread's own work happens under the pool's lock.

    Args:
        cudart: unregisters; None where nothing is locked.
        gone: called by the thread, without any lock, after each slab.
    """

    def __init__(self, cudart: Cudart | None, gone: Callable[[Slab], None]) -> None:
        self.trims = Trims()
        self.is_busy = False
        """Whether a slab is being unmapped; `gone` sets it back."""
        self._cudart = cudart
        self._gone = gone
        self._queue: deque[Slab] = deque()
        self._leaving: Slab | None = None
        self._books = threading.Lock()  # between the thread and the pool, held for a moment only
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    @property
    def locked_bytes(self) -> int:
        """Bytes that are still page-locked."""
        with self._books:
            slabs = [*self._queue, *([self._leaving] if self._leaving is not None else [])]
            return sum(slab.nbytes for slab in slabs if slab.is_locked)

    def start(self, slabs: Sequence[Slab]) -> None:
        """Queue slabs that nobody uses."""
        with self._books:
            self._queue.extend(slabs)
            if not self._queue or self._thread is not None:
                return
            self._thread = threading.Thread(target=self._work, name="memopt-trim", daemon=True)
            self._thread.start()

    def call_back(self) -> list[Slab]:
        """Return the slabs whose turn has not come; they stay as they are."""
        with self._books:
            slabs = list(self._queue)
            self._queue.clear()
        return slabs

    def stop(self) -> None:
        """End the thread; the queue must be empty. Called without the pool's lock."""
        self._stopped.set()
        thread = self._thread
        if thread is not None:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._books:
                if not self._queue:
                    self._thread = None
                    return
                slab = self._leaving = self._queue.popleft()
                self.is_busy = True
            begin = time.perf_counter()
            unlock(slab, self._cudart)
            if (
                sys.getrefcount(slab.memory) <= 2
            ):  # else a tensor of a buffer given back shows it still
                slab.discard()
                slab.memory.close()
            took_s = time.perf_counter() - begin
            with self._books:
                self._leaving = None
                self.trims = replace(
                    self.trims,
                    num_slabs=self.trims.num_slabs + 1,
                    size_bytes=self.trims.size_bytes + slab.nbytes,
                    total_s=self.trims.total_s + took_s,
                    longest_s=max(self.trims.longest_s, took_s),
                )
            self._gone(slab)
            del slab
            self._stopped.wait(max(_LEAST_PAUSE_S, _PAUSE_FACTOR * took_s))
