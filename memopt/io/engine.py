"""The storage engine protocol: batches of reads and writes go in, tickets come out, every error surfaces once.

Two engines implement it: ``io_uring`` (:mod:`memopt.io.uring`, native) and ``threads`` (:mod:`memopt.io.threads`, pure
Python system calls). One conformance suite holds both to the same promises:

* every completion is checked, a short transfer is resumed, and a failure is an :class:`OSError` with errno, path and
  offset, raised where the ticket is waited for; a failure that nobody waited for is raised by :meth:`Engine.drain` and
  :meth:`Engine.close`, so none is lost;
* buffers stay alive until the last byte moved, whatever the caller drops;
* a batch may be larger than the queue; submission never waits for the disk;
* where :attr:`Engine.defers`, a batch can be prepared now and released later by native code (a CUDA host function), and
  sets a word in memory when it is over (for a GPU that waits for it); such a batch keeps every promise above;
* all methods may be called from any thread; a forked child may only close the engine it inherited.

DeepSpeed's ``aio_handle`` does not look at the result of a completion, so a full disk reads as success (DeepSpeed
0.19.8, ``csrc/aio``); the promises above are the difference.
"""

from __future__ import annotations

import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from memopt.io.buffers import BouncePool, Buffer, RawBuffer
from memopt.io.depth import DEFAULT_QUEUE_DEPTH
from memopt.io.files import IoFile
from memopt.io.pieces import Piece, Transfer, plan_batch, release_bounces
from memopt.io.ticket import Ticket, fresh
from memopt.types.errors import IoEngineUnavailable

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Engine", "EngineName", "EngineStats", "Ticket", "fresh", "open_engine"]

EngineName = Literal["auto", "io_uring", "threads"]
MAX_UNIT_BYTES = 65536
_log = logging.getLogger(__name__)
# Engines with transfers in flight: the kernel still writes to their buffers, so they must not be collected.
_BUSY: set[Engine] = set()


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """Totals since the engine was opened; bytes of finished batches only."""

    num_tickets: int
    num_in_flight: int
    num_failed: int
    read_bytes: int
    written_bytes: int
    buffered_bytes: int
    """Bytes that went through the page cache because they could not be aligned."""


class Engine(ABC):
    """Base of the engines: checks, cuts transfers into pieces, keeps the books. See the module for the promises."""

    name: str
    defers = False
    """Whether :meth:`prepare` and ``when_over`` work."""

    def __init__(self, *, queue_depth: int, reason: str = "") -> None:
        if queue_depth < 1 or queue_depth > 4096:
            raise ValueError(
                f"queue_depth={queue_depth} is outside 1..4096; 32 suits most NVMe drives"
            )
        self.queue_depth = queue_depth
        """Blocks that are in the kernel at a time, at most."""
        self.reason = reason
        """Why ``auto`` chose this engine instead of io_uring; empty when the engine is what was asked for."""
        self.bounces = BouncePool(MAX_UNIT_BYTES, blocks_per_slab=16)
        self._pid = os.getpid()
        self._closed = False
        self._lock = threading.Lock()
        self._gate = (
            threading.Lock()
        )  # held while transfers are started, and while the engine stops taking them
        self._closing = threading.RLock()
        self._in_flight: dict[Ticket, None] = {}  # in the order of submission
        self._failed: list[Ticket] = []
        self._totals = {"tickets": 0, "failed": 0, "read": 0, "write": 0, "buffered": 0}

    @abstractmethod
    def _ticket(self, pieces: list[Piece], when_over: RawBuffer | None) -> Ticket:
        """Return a ticket for ``pieces`` (maybe none) that queues them when it begins; must not block on the disk."""

    def _prepared(
        self, pieces: list[Piece], when_over: RawBuffer | None, alive: Callable[[], object] | None
    ) -> Ticket:
        """Return a ticket for ``pieces`` that does not queue them when it begins."""
        raise NotImplementedError

    @abstractmethod
    def _shut_down(self) -> None:
        """Release threads and rings; nothing is in flight. In a forked child: what is safe there.

        Called again it does nothing, or what an interrupted call left.
        """

    def submit(
        self, transfers: Sequence[Transfer], *, when_over: RawBuffer | None = None
    ) -> Ticket:
        """Start a batch. The transfers of a batch, and of batches in flight, are not ordered against each other.

        Args:
            transfers: what to move.
            when_over: 4 bytes that become the number 1 when the batch is over, well or badly (where the engine
                :attr:`defers`).

        Raises:
            ValueError: a transfer that cannot be (read-only target, negative offset, closed file, closed engine).
            IoEngineUnavailable: the engine was opened in another process (before a fork).
        """
        self._check_deferral(when_over)
        return self._begin(transfers, lambda pieces: self._ticket(pieces, when_over))

    def prepare(
        self,
        transfers: Sequence[Transfer],
        *,
        when_over: RawBuffer | None = None,
        alive: Callable[[], object] | None = None,
    ) -> Ticket:
        """Plan a batch that :meth:`Ticket.release`, or native code, queues later; needs :attr:`defers`.

        The bytes of a write are looked at after the release only. A batch that was never released is cancelled by
        :meth:`close`, and :meth:`drain` does not wait for it.

        Args:
            transfers: what to move.
            when_over: as for :meth:`submit`.
            alive: asked now and then by whoever waits for a batch that is not released; raises when it never will be
                (the GPU that should do it is lost), and the batch is cancelled with that as its reason.

        Raises:
            ValueError: as for :meth:`submit`, or the engine cannot defer.
        """
        self._check_deferral(self)
        return self._begin(transfers, lambda pieces: self._prepared(pieces, when_over, alive))

    def _check_deferral(self, asked: object) -> None:
        if asked is not None and not self.defers:
            raise ValueError(
                f"the {self.name} engine cannot be driven by native code; open engine='io_uring'"
            )

    def _begin(
        self, transfers: Sequence[Transfer], make: Callable[[list[Piece]], Ticket]
    ) -> Ticket:
        """Give the engine a batch. A KeyboardInterrupt here leaves it in the books where the engine has it."""
        self._check_process()
        self._reap()
        with self._gate:
            self._check_usable()
            pieces = plan_batch(transfers, self.bounces)
            ticket: Ticket | None = None
            try:
                ticket = make(pieces)
                with self._lock:
                    self._in_flight[ticket] = None
                    _BUSY.add(self)
                ticket.begin()
                self._totals["tickets"] += 1
            except BaseException:
                if ticket is None or not ticket.begun:
                    self._forget(ticket, pieces)
                raise
        return ticket

    def _forget(self, ticket: Ticket | None, pieces: list[Piece]) -> None:
        """Undo what was done for a batch that the engine was not given."""
        with self._lock:
            if ticket is not None:
                self._in_flight.pop(ticket, None)
            if not self._in_flight:
                _BUSY.discard(self)
        release_bounces(pieces, self.bounces)

    def read(self, file: IoFile, offset: int, buffer: Buffer, *, padded: bool = False) -> Ticket:
        """Start filling ``buffer`` with the bytes of ``file`` from ``offset`` on."""
        return self.submit(
            [Transfer(kind="read", file=file, offset=offset, buffer=buffer, padded=padded)]
        )

    def write(self, file: IoFile, offset: int, buffer: Buffer, *, padded: bool = False) -> Ticket:
        """Start writing ``buffer`` to ``file`` at ``offset``."""
        return self.submit(
            [Transfer(kind="write", file=file, offset=offset, buffer=buffer, padded=padded)]
        )

    def wait(self, ticket: Ticket, timeout_s: float | None = None) -> None:
        """Same as ``ticket.wait(timeout_s)``."""
        ticket.wait(timeout_s)

    def poll(self, ticket: Ticket) -> bool:
        """Same as ``ticket.done()``."""
        return ticket.done()

    def register_buffers(self, buffers: Sequence[Buffer]) -> str:
        """Map long-lived buffers once for all transfers; return why that had no effect, or ""."""
        del buffers
        return f"the {self.name} engine has no registered buffers"

    def unregister_buffers(self) -> None:  # noqa: B027 - engines without registration have nothing to undo
        """Forget the buffers registered before; call it before their memory is freed."""

    def set_queue_depth(self, queue_depth: int) -> int:
        """Keep so many blocks in the kernel from now on, or as many as the engine was opened for; return how many.

        Raises:
            ValueError: ``queue_depth`` is below 1.
        """
        if queue_depth < 1:
            raise ValueError(f"queue_depth={queue_depth} must be at least 1")
        return self.queue_depth

    def detach(self, file: IoFile) -> None:  # noqa: B027 - engines without registration have nothing to undo
        """Forget ``file``; call it before the file is closed, when no transfer on it is in flight."""

    def drain(self) -> None:
        """Wait for everything released and raise the first failure that nobody has waited for."""
        self._check_usable()
        for ticket in self._snapshot():
            if ticket.released:
                ticket._finished(None)
                self._settle(ticket)
        self._raise_unclaimed()

    def stats(self) -> EngineStats:
        """Return the totals so far."""
        self._reap(max_busy=None)
        with self._lock:
            totals = dict(self._totals)
            num_in_flight = len(self._in_flight)
        return EngineStats(
            num_tickets=totals["tickets"],
            num_in_flight=num_in_flight,
            num_failed=totals["failed"],
            read_bytes=totals["read"],
            written_bytes=totals["write"],
            buffered_bytes=totals["buffered"],
        )

    def close(self) -> None:
        """Finish what is in flight, release everything, then raise the first failure that nobody has waited for.

        In a forked child it releases the child's copies and leaves the parent's transfers alone. Safe to call twice,
        and again after a KeyboardInterrupt anywhere in here: the second call does what the first one left.
        """
        if self.is_inherited:
            self._closed = True
            self._shut_down()
            return
        with self._gate:
            self._closed = True
        with self._closing:
            for ticket in self._snapshot():
                if not ticket.begun:  # two interrupts left it
                    self._forget(ticket, [])
                    continue
                ticket.cancel()
                ticket._finished(None)
                self._settle(ticket)
            _BUSY.discard(self)
            self._shut_down()
        self._raise_unclaimed()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except OSError:
            if error is None:
                raise
            _log.warning(
                "an I/O error was not waited for, and another exception is being raised",
                exc_info=True,
            )

    @property
    def is_inherited(self) -> bool:
        """Whether this is a forked child: its locks may be held by threads that it does not have."""
        return os.getpid() != self._pid

    def _check_usable(self) -> None:
        if self._closed:
            raise ValueError(f"the {self.name} engine is closed")
        self._check_process()

    def _check_process(self) -> None:
        if self.is_inherited:
            msg = (
                f"the {self.name} engine was opened in process {self._pid} and this is {os.getpid()}: "
                "a forked child has no workers and must open its own engine"
            )
            raise IoEngineUnavailable(msg)

    def _snapshot(self) -> list[Ticket]:
        with self._lock:
            return list(self._in_flight)

    def _reap(self, *, max_busy: int | None = 8) -> None:
        """Settle finished tickets that their owners dropped, so that their buffers are freed.

        Tickets end about in the order in which they began: behind ``max_busy`` that have not, none is asked.
        """
        num_busy = 0
        for ticket in self._snapshot():
            if ticket._finished(0.0):
                self._settle(ticket)
            elif num_busy == max_busy:
                return
            else:
                num_busy += 1

    def _settle(self, ticket: Ticket) -> None:
        """Enter a finished ticket in the books and let go of its buffers; only the first call does anything."""
        with self._lock:
            if ticket not in self._in_flight:
                return
            if ticket.error is None:
                self._count(ticket)
            elif ticket not in self._failed:
                self._failed.append(ticket)
                self._totals["failed"] += 1
            del self._in_flight[ticket]  # the last: an interrupt before here loses no error
            pieces, ticket.pieces = ticket.pieces, []
            if not self._in_flight:
                _BUSY.discard(self)
        release_bounces(pieces, self.bounces)

    def _count(self, ticket: Ticket) -> None:
        for piece in ticket.pieces:
            self._totals[piece.kind] += piece.payload_bytes
            if not piece.direct:
                self._totals["buffered"] += piece.payload_bytes

    def _raise_unclaimed(self) -> None:
        with self._lock:
            unclaimed = [ticket for ticket in self._failed if not ticket.claimed]
            self._failed = []
        if unclaimed:
            unclaimed[0].claimed = True
            assert unclaimed[0].error is not None
            raise fresh(unclaimed[0].error)


def open_engine(
    engine: EngineName = "auto",
    *,
    queue_depth: int = DEFAULT_QUEUE_DEPTH,
    max_queue_depth: int | None = None,
    block_bytes: int | None = None,
    directory: str | os.PathLike[str] | None = None,
) -> Engine:
    """Open a storage engine.

    Args:
        engine: ``"io_uring"`` and ``"threads"`` are taken literally; ``"auto"`` tries io_uring with real I/O and falls
            back to threads, saying why in :attr:`Engine.reason` and in the log.
        queue_depth: transfers of one block that the engine keeps in the kernel at a time, 1 to 4096.
        max_queue_depth: what :meth:`Engine.set_queue_depth` may raise that to (io_uring); ``queue_depth`` when omitted.
        block_bytes: size of io_uring's blocks, a multiple of 4096; a good one when omitted. Threads choose their own.
        directory: where the probe writes and reads one block; an anonymous memory file when omitted.

    Raises:
        ValueError: an unknown name, or a queue depth or block size that cannot be.
        IoEngineUnavailable: the engine named explicitly cannot run here.
    """
    from memopt.io.threads import ThreadsEngine

    if engine == "threads":
        return ThreadsEngine(queue_depth=queue_depth)
    if engine not in ("auto", "io_uring"):
        raise ValueError(f'engine={engine!r} is unknown; choose "auto", "io_uring" or "threads"')
    try:
        return _open_uring(queue_depth, max_queue_depth, block_bytes, directory)
    except IoEngineUnavailable as error:
        if engine == "io_uring":
            raise
        reason = str(error)
    _log.info("using the threads engine: %s", reason)
    return ThreadsEngine(queue_depth=queue_depth, reason=reason)


def _open_uring(
    queue_depth: int,
    max_queue_depth: int | None,
    block_bytes: int | None,
    directory: str | os.PathLike[str] | None,
) -> Engine:
    from memopt.io.depth import BLOCK_BYTES
    from memopt.io.uring import UringEngine

    return UringEngine.open(
        queue_depth=queue_depth,
        max_queue_depth=max_queue_depth,
        block_bytes=BLOCK_BYTES if block_bytes is None else block_bytes,
        directory=directory,
    )
