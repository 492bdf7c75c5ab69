"""The ``threads`` engine: ``preadv``/``pwritev`` from a small pool, for machines where io_uring is not allowed.

The system calls release Python's lock, so the disk sees several requests at once. Each trip back to Python costs the
lock again, which a busy training loop holds for up to its switch interval (5 ms): blocks are therefore large (4 MiB
when a transfer is large enough to keep every worker busy with such blocks), where io_uring uses 1 MiB.

Workers hold no reference to the engine, only to the shared queue: an engine that was dropped without ``close`` is
still collected, and its finalizer stops them.
"""

from __future__ import annotations

import errno
import operator
import os
import queue
import threading
import time
import weakref
from collections import deque
from typing import TypeAlias

from memopt.io.buffers import BufferView, RawBuffer
from memopt.io.depth import DEFAULT_QUEUE_DEPTH
from memopt.io.engine import Engine, Ticket
from memopt.io.pieces import Piece

__all__ = ["ThreadsEngine"]

_MAX_WORKERS = 8
_MIN_BLOCK_BYTES = 1 << 20
_MAX_BLOCK_BYTES = 4 << 20
_DSYNC = getattr(os, "RWF_DSYNC", 0)


class _ThreadsTicket(Ticket):
    """Counts its blocks down; the worker that finishes the last one sets the event."""

    def __init__(self, engine: ThreadsEngine, pieces: list[Piece]) -> None:
        super().__init__(engine, pieces)
        self._event = threading.Event()
        self._blocks_lock = threading.Lock()
        jobs = [(self, piece, *block) for piece in pieces for block in engine._blocks(piece)]
        self._put = engine._jobs.put
        self._num_left = len(jobs)
        self._unqueued = iter(jobs)
        if not jobs:
            self._event.set()

    @property
    def begun(self) -> bool:
        return operator.length_hint(self._unqueued) == 0

    def begin(self) -> None:
        # In one step of C: a KeyboardInterrupt comes before all of them or after.
        deque(map(self._put, self._unqueued), maxlen=0)

    def _finished(self, timeout_s: float | None) -> bool:
        return self._event.is_set() if timeout_s == 0.0 else self._event.wait(timeout_s)

    def block_done(self, error: OSError | None) -> None:
        with self._blocks_lock:
            if error is not None and self.error is None:
                error.__context__ = error.__traceback__ = (
                    None  # their frames would keep the buffers alive
                )
                self.error = error
            self._num_left -= 1
            if self._num_left == 0:
                self._event.set()


_Job: TypeAlias = "tuple[_ThreadsTicket, Piece, int, int] | None"


class ThreadsEngine(Engine):
    """Up to eight worker threads, each with one system call in flight. See the module."""

    name = "threads"

    def __init__(self, *, queue_depth: int = DEFAULT_QUEUE_DEPTH, reason: str = "") -> None:
        super().__init__(queue_depth=queue_depth, reason=reason)
        self.num_workers = self.queue_depth = min(queue_depth, _MAX_WORKERS)
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._workers = [
            threading.Thread(target=_work, args=(self._jobs,), name=f"memopt-io-{i}", daemon=True)
            for i in range(self.num_workers)
        ]
        for worker in self._workers:
            worker.start()
        self._finalizer = weakref.finalize(self, _stop, self._jobs, self.num_workers, os.getpid())

    def _ticket(self, pieces: list[Piece], when_over: RawBuffer | None) -> Ticket:
        del when_over  # refused before
        return _ThreadsTicket(self, pieces)

    def _blocks(self, piece: Piece) -> list[tuple[int, int]]:
        """Cut a piece at multiples of its unit, into blocks that keep the workers evenly busy."""
        unit, nbytes = piece.file.unit_bytes, piece.view.nbytes
        share = -(-nbytes // self.num_workers)
        block_bytes = min(max(share, _MIN_BLOCK_BYTES), _MAX_BLOCK_BYTES)
        block_bytes = -(-block_bytes // unit) * unit
        return [
            (start, min(start + block_bytes, nbytes)) for start in range(0, nbytes, block_bytes)
        ]

    def _shut_down(self) -> None:
        _stop(self._jobs, self.num_workers, self._pid)  # once more than needed hurts nobody
        if os.getpid() == self._pid:
            for worker in self._workers:
                worker.join()
        self._finalizer.detach()


def _stop(jobs: queue.SimpleQueue[_Job], num_workers: int, pid: int) -> None:
    if os.getpid() == pid:  # a forked child has no workers, and its copy of the queue may be locked
        for _ in range(num_workers):
            jobs.put(None)


def _work(jobs: queue.SimpleQueue[_Job]) -> None:
    while True:
        job = jobs.get()
        if job is None:
            return
        ticket, piece, start, stop = job
        error: OSError | None = None
        try:
            if ticket.error is None:
                _run_block(piece, start, stop)
        except OSError as failure:
            error = failure
        except Exception as failure:  # noqa: BLE001 - a worker that dies would leave its ticket waiting for ever
            error = piece.error(errno.EIO, start, f"unexpected {type(failure).__name__}: {failure}")
        del job, piece  # the buffers must be free as soon as the ticket says that it is finished
        ticket.block_done(error)
        del ticket, error


def _run_block(piece: Piece, start: int, stop: int) -> None:
    """Transfer the bytes ``[start, stop)`` of ``piece``, resuming short transfers."""
    done = start
    if piece.payload is not None and piece.kind == "write":
        piece.view.view[: piece.payload.nbytes] = piece.payload.view
    while done < stop:
        part = piece.view.part(done, stop)
        direct = piece.direct and (done - start) % piece.file.unit_bytes == 0
        try:
            moved = _call(piece, part, piece.offset + done, direct=direct)
        except InterruptedError:
            continue
        except BlockingIOError:
            time.sleep(0.001)
            continue
        except OSError as error:
            if (
                direct and error.errno == errno.EINVAL
            ):  # the file system refuses this alignment after all
                piece.direct = False
                continue
            raise piece.error(error.errno or errno.EIO, done) from None
        if moved == 0:
            raise piece.end_of_file(done)
        done += moved
    if piece.payload is not None and piece.kind == "read":
        piece.payload.view[:] = piece.view.view[: piece.payload.nbytes]


def _call(piece: Piece, part: BufferView, offset: int, *, direct: bool) -> int:
    """Make one system call; the fault injection of the tests replaces this function."""
    fd = piece.file.direct_fd if direct else piece.file.buffered_fd
    if piece.kind == "read":
        return os.preadv(fd, [part.view], offset)
    return os.pwritev(fd, [part.view], offset, 0 if direct else _DSYNC)
