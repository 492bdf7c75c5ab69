"""Threads that fault slabs in and page-lock them, beside the program's own work.

A slab is faulted in by pieces, by all threads at once; whoever finishes the last piece registers the slab. So one slab
is ready as fast as the machine can make it, and many slabs overlap faulting with registration.

That is the pace while somebody waits for memory. Else it is calm: a call that registers holds up every other CUDA call
of the process, so they follow one another with a pause as long as the call was, in which the program queues its work.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field

from memopt.memory._cudart import Cudart
from memopt.memory._slab import Slab

__all__ = ["SlabBuilder", "unlock", "unlock_all"]

_PIECE_BYTES = 64 << 20
_LOOK_S = 0.005
"""How long a pause may go on after somebody has begun to wait."""

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Job:
    """A slab on its way: ``done`` is called once, with the first error or None."""

    slab: Slab
    done: Callable[[Slab, BaseException | None], None]
    num_left: int
    error: BaseException | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class SlabBuilder:
    """Fault in and lock slabs with ``num_threads`` threads; the first refusal to lock ends locking, not the pool."""

    def __init__(self, num_threads: int, cudart: Cudart | None, unlocked_reason: str) -> None:
        self.unlocked_reason = unlocked_reason
        self.populate_s = 0.0
        self.lock_s = 0.0
        self._num_threads = num_threads
        self._cudart = cudart
        self._workers: ThreadPoolExecutor | None = None
        self._books = threading.Lock()
        self._turn = threading.Lock()
        self._num_waiting = 0
        self._is_needed = True
        _builders.add(self)

    def start(self, slab: Slab, done: Callable[[Slab, BaseException | None], None]) -> None:
        """Return at once; ``done(slab, error)`` is called by a worker thread, after an exception in here perhaps.

        Raises:
            RuntimeError: the system refuses a thread.
        """
        if self._workers is None:
            self._workers = ThreadPoolExecutor(self._num_threads, "memopt-pin")
        begins = range(0, slab.nbytes, _PIECE_BYTES)
        job = _Job(slab, done, len(begins))
        for begin in begins:
            self._workers.submit(self._piece, job, begin)

    @contextmanager
    def hurry(self) -> Iterator[None]:
        """Somebody waits for slabs inside: no pauses."""
        with self._books:
            self._num_waiting += 1
        try:
            yield
        finally:
            with self._books:
                self._num_waiting -= 1

    def abandon(self) -> None:
        """What is on its way is not needed any more: ``done`` is called soon, for slabs as they are."""
        self._is_needed = False

    def stop(self) -> None:
        """End the threads; nothing is on its way any more."""
        if self._workers is not None:
            with self.hurry():
                self._workers.shutdown(wait=True)
            self._workers = None

    def _piece(self, job: _Job, begin: int) -> None:
        start = time.perf_counter()
        error: BaseException | None = None
        try:
            if job.error is None and self._is_needed:
                job.slab.populate(begin, min(begin + _PIECE_BYTES, job.slab.nbytes))
        except BaseException as failure:  # noqa: BLE001 - the thread that waits for the slab raises it
            error = failure
        with self._books:
            self.populate_s += time.perf_counter() - start
        with job.lock:
            job.error = job.error or error
            job.num_left -= 1
            if job.num_left:
                return
        with nullcontext() if self._num_waiting else self._turn:
            start = time.perf_counter()
            try:
                if job.error is None and self._is_needed:
                    self._lock(job.slab)
            except BaseException as failure:  # noqa: BLE001 - as above: nobody may wait for a slab for ever
                job.error = failure
            took_s = time.perf_counter() - start
            job.done(job.slab, job.error)
            self._pause(took_s)

    def _pause(self, seconds: float) -> None:
        """Let the program's CUDA calls through, unless somebody waits for memory, or nobody will."""
        end = time.perf_counter() + seconds
        while (
            self._is_needed and not self._num_waiting and (left := end - time.perf_counter()) > 0.0
        ):
            time.sleep(min(left, _LOOK_S))

    def _lock(self, slab: Slab) -> None:
        if self._cudart is None or self.unlocked_reason:
            return
        start = time.perf_counter()
        error = self._cudart.host_register(slab.address, slab.nbytes)
        slab.is_locked = not error
        with self._books:
            self.lock_s += time.perf_counter() - start
            if error and not self.unlocked_reason:
                self.unlocked_reason = f"page-locking {slab.nbytes} bytes failed: {error}"
                _log.warning("host memory stays pageable: %s", self.unlocked_reason)


def _program_ends() -> None:
    """The interpreter waits at its end for what the threads still have to do: nothing."""
    for builder in list(_builders):
        builder.abandon()


_builders: weakref.WeakSet[SlabBuilder] = weakref.WeakSet()
# `atexit` comes after that wait; this is how concurrent.futures itself ends its threads.
_at_end = getattr(threading, "_register_atexit", None)
if _at_end is not None:
    with suppress(RuntimeError):  # it ends already
        _at_end(_program_ends)


def unlock(slab: Slab, cudart: Cudart | None) -> None:
    """Unregister ``slab``: before its memory goes away, always."""
    if slab.is_locked and cudart is not None:
        error = cudart.host_unregister(slab.address)
        slab.is_locked = False  # now: memory must not go away registered, whatever interrupts this
        if error:
            _log.warning("unlocking %d bytes of host memory failed: %s", slab.nbytes, error)


def unlock_all(slabs: list[Slab], cudart: Cudart | None, pid: int) -> None:
    """Free every slab; a forked child has none of them."""
    if os.getpid() != pid:
        return
    if cudart is not None and any(slab.is_locked for slab in slabs):
        cudart.synchronize()  # a copy may still read or write buffers that were never given back
    for slab in slabs:
        unlock(slab, cudart)
    slabs.clear()
