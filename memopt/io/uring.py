"""The ``io_uring`` engine: one native thread keeps the ring full and finishes tickets without Python's lock.

The native part is ``csrc/io/uring_engine.c``, bound with cffi in API mode (``memopt.io._uring``). Python hands over a
batch with one call and hears of it again when someone asks for the ticket; between the two, no Python code runs, so a
training loop that holds the lock does not slow the disk, nor the disk the loop.

Calls that cannot wait keep Python's lock (``native.py``): cffi lets go of it in every call, and a thread that
spins in bytecode then has it for the switch interval, 5 ms, before a call of a microsecond returns.

io_uring is refused in many containers (the default seccomp profiles of Docker and containerd answer EPERM) and missing
on old kernels; so opening the engine writes and reads one real block and turns whatever fails into
:class:`IoEngineUnavailable` with the reason.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memopt.io.buffers import Buffer, BufferView, RawBuffer, view_of
from memopt.io.depth import BLOCK_BYTES, DEFAULT_QUEUE_DEPTH
from memopt.io.engine import Engine, Ticket
from memopt.io.files import IoFile, create_unlinked
from memopt.io.native import Handle, ShortCalls, address_of, load_native
from memopt.io.pieces import Piece
from memopt.types.errors import IoEngineUnavailable

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["UringCounters", "UringEngine", "load_native"]

_SIGNAL_CHECK_S = 0.1
_DISABLED = Path("/proc/sys/kernel/io_uring_disabled")
_REASONS = {
    errno.EPERM: "a container's seccomp profile forbids it (allow the io_uring_* system calls)",
    errno.ENOSYS: "this kernel has no io_uring",
    errno.EACCES: "a security policy of the system (SELinux) forbids it",
    errno.ENOMEM: "kernels before 5.12 count rings as locked memory (see `ulimit -l`)",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class UringCounters:
    """What the ring did: blocks asked of the kernel, resumed after a short transfer, tried again, most at a time."""

    num_blocks: int
    num_resumed: int
    num_retried: int
    num_fixed_buffers: int
    num_enters: int
    peak_blocks: int


class _UringTicket(Ticket):
    def __init__(
        self, engine: UringEngine, pieces: list[Piece], when_over: RawBuffer | None
    ) -> None:
        super().__init__(engine, pieces)
        self._handle = Handle(engine._short.free)
        self._when_over = when_over  # kept alive: the driver writes there
        self._native = engine._native
        self._short = engine._short
        self._ring = engine._ring
        self._ring_address = engine._ring_address
        self._result = engine._native.ffi.new("memopt_uring_result *")
        self._is_over = False

    @property
    def begun(self) -> bool:
        return self._handle.address != 0

    def begin(self) -> None:
        self._hand_over(self._short.submit)

    def _hand_over(self, call: Any) -> None:
        """Copy the pieces to native requests and ``call`` with them; that sets the handle."""
        engine, when_over = self._engine, self._when_over
        assert isinstance(engine, UringEngine)
        requests = engine._requests_for(self.pieces)
        at, word = address_of(self._native, requests), when_over.address if when_over else 0
        out = ctypes.byref(self._handle.out)
        rc = call(self._ring_address, at, len(self.pieces), word, out)
        if rc < 0:
            raise OSError(-rc, f"{os.strerror(-rc)}: io_uring does not take requests any more")

    def _finished(self, timeout_s: float | None) -> bool:
        if self._is_over or (self.begun and self._poll()):
            return True
        if timeout_s == 0.0:
            return False
        end = None if timeout_s is None else time.monotonic() + timeout_s
        ffi = self._native.ffi
        handle = ffi.cast("memopt_uring_ticket *", self._handle.address)
        result = ffi.new("memopt_uring_result *")
        while True:
            left = (
                _SIGNAL_CHECK_S
                if end is None
                else min(_SIGNAL_CHECK_S, max(0.0, end - time.monotonic()))
            )
            # Back in Python every tenth of a second: a KeyboardInterrupt must not wait for the disk.
            if self._native.lib.memopt_uring_wait(self._ring, handle, int(left * 1e9), result):
                self._take_result(result)
                return True
            self._check_alive()
            if end is not None and time.monotonic() >= end:
                return False

    def _poll(self) -> bool:
        result = address_of(self._native, self._result)
        if self._short.poll(self._ring_address, self._handle.address, result):
            self._take_result(self._result)
        return self._is_over

    def _take_result(self, result: Any) -> None:
        with self._engine._lock:
            if self._is_over:
                return
            if result.error and not self.pieces:
                self.error = OSError(result.error, f"{os.strerror(result.error)}: an empty batch")
            elif result.error == errno.ECANCELED:
                self.error = self.pieces[0].error(errno.ECANCELED, 0, self._why_cancelled())
            elif result.error:
                piece, done = self.pieces[result.request], int(result.done_bytes)
                moved_nothing = result.error == errno.ENODATA
                self.error = (
                    piece.end_of_file(done) if moved_nothing else piece.error(result.error, done)
                )
            self._is_over = True

    def _check_alive(self) -> None:
        """A batch that can be waited for is queued, unless it is a prepared one."""

    def _why_cancelled(self) -> str:
        return "the engine was closed first"


class _PreparedTicket(_UringTicket):
    """A batch that waits for its release; native code owns a share of the handle until it has released it."""

    alive: Callable[[], object] | None = None
    lost: BaseException | None = None

    def begin(self) -> None:
        self._hand_over(self._short.prepare)

    @property
    def released(self) -> bool:
        return self.begun and bool(self._short.is_released(self._handle.address))

    def release(self) -> None:
        self._short.arm(self._handle.address)
        self._short.release(self._handle.address)

    def release_call(self) -> tuple[int, int]:
        self._short.arm(self._handle.address)
        return self._short.release_address, self._handle.address

    def cancel(self) -> bool:
        if not self._short.cancel(self._handle.address):
            return False
        self.claimed = True
        return True

    def _check_alive(self) -> None:
        if self.alive is None or self.released:
            return
        try:
            self.alive()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is why nobody will release this batch
            self.lost = error
            self.cancel()

    def _why_cancelled(self) -> str:
        if self.lost is None:
            return "the batch was cancelled before it was released"
        return f"the batch will never be released: {self.lost}"


class UringEngine(Engine):
    """io_uring with registered files and buffers. Use :meth:`open`, which probes. See the module."""

    name = "io_uring"
    defers = True

    def __init__(
        self,
        *,
        queue_depth: int = DEFAULT_QUEUE_DEPTH,
        max_queue_depth: int | None = None,
        block_bytes: int = BLOCK_BYTES,
        sqpoll: bool = False,
    ) -> None:
        super().__init__(queue_depth=queue_depth)
        if not 4096 <= block_bytes <= 1 << 30 or block_bytes % 4096:
            raise ValueError(
                f"block_bytes={block_bytes} must be a multiple of 4096 from 4096 to {1 << 30}"
            )
        self.block_bytes = block_bytes
        self._max_depth = max(queue_depth, min(max_queue_depth or queue_depth, 4096))
        self._native = load_native()
        self._short = ShortCalls(self._native)
        self._ring = self._open_ring(sqpoll)
        self._ring_address = address_of(self._native, self._ring)
        self._finalizer = weakref.finalize(self, _release, self._native, self._ring, self._pid)
        self._slots: dict[IoFile, list[Any]] = {}
        self._registered: list[BufferView] = []
        self.set_queue_depth(queue_depth)

    @classmethod
    def open(
        cls,
        *,
        queue_depth: int = DEFAULT_QUEUE_DEPTH,
        max_queue_depth: int | None = None,
        block_bytes: int = BLOCK_BYTES,
        sqpoll: bool = False,
        directory: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Open the engine and prove it by writing and reading one block.

        Args:
            queue_depth: blocks in the kernel at a time.
            max_queue_depth: what :meth:`set_queue_depth` may raise that to; ``queue_depth`` when omitted.
            block_bytes: transfers are cut into blocks of this size, so that one transfer fills the queue.
            sqpoll: let a kernel thread poll for submissions (saves system calls, costs a core).
            directory: where to probe; an anonymous memory file when omitted.

        Raises:
            IoEngineUnavailable: io_uring cannot run here; the message says why.
        """
        engine = cls(
            queue_depth=queue_depth,
            max_queue_depth=max_queue_depth,
            block_bytes=block_bytes,
            sqpoll=sqpoll,
        )
        try:
            prove(engine, directory)
        except OSError as error:
            engine.close()
            raise IoEngineUnavailable(f"io_uring: a test block failed: {error}") from error
        engine._totals = dict.fromkeys(engine._totals, 0)  # the probe is not the user's traffic
        return engine

    def _open_ring(self, sqpoll: bool) -> Any:
        out = self._native.ffi.new("memopt_uring **")
        rc = self._native.lib.memopt_uring_open(self._max_depth, self.block_bytes, int(sqpoll), out)
        if rc < 0:
            raise IoEngineUnavailable(f"io_uring: {os.strerror(-rc)}{_why_refused(-rc)}")
        return self._native.ffi.gc(out[0], self._native.lib.memopt_uring_free)

    def _ticket(self, pieces: list[Piece], when_over: RawBuffer | None) -> Ticket:
        _check_word(when_over)
        return _UringTicket(self, pieces, when_over)

    def _prepared(
        self, pieces: list[Piece], when_over: RawBuffer | None, alive: Callable[[], object] | None
    ) -> Ticket:
        _check_word(when_over)
        ticket = _PreparedTicket(self, pieces, when_over)
        ticket.alive = alive
        return ticket

    def _requests_for(self, pieces: Sequence[Piece]) -> Any:
        requests = self._native.ffi.new("memopt_uring_request[]", len(pieces))
        for request, piece in zip(requests, pieces, strict=True):
            self._fill(request, piece)
        return requests

    def _fill(self, request: Any, piece: Piece) -> None:
        direct_slot, plain_slot = self._slots_of(piece.file)
        request.address = piece.view.address
        request.nbytes = piece.view.nbytes
        request.offset = piece.offset
        if piece.payload is not None:
            request.payload = piece.payload.address
            request.copy_bytes = piece.payload.nbytes
        request.unit_bytes = piece.file.unit_bytes
        request.direct_fd = piece.file.direct_fd
        request.direct_slot = direct_slot
        request.plain_fd = piece.file.buffered_fd
        request.plain_slot = plain_slot
        request.is_write = piece.kind == "write"
        request.is_direct = piece.direct

    def _slots_of(self, file: IoFile) -> tuple[int, int]:
        """Return the registered files of ``file``; the table is full after 128 files, the rest goes by descriptor."""
        if not file.is_long_lived:
            return -1, -1
        slots = self._slots.get(file)
        if slots is None:
            direct, plain = self._add_fd(file.direct_fd), self._add_fd(file.buffered_fd)
            slots = self._slots[file] = [None, direct, plain]
        _, direct, plain = slots
        return direct, plain

    def _add_fd(self, fd: int) -> int:
        return (
            max(int(self._native.lib.memopt_uring_add_file(self._ring, fd)), -1) if fd >= 0 else -1
        )

    def detach(self, file: IoFile) -> None:
        """Forget ``file``: a registered file keeps its disk space even when it is closed."""
        if self._closed or os.getpid() != self._pid:
            return
        remove = functools.partial(self._native.lib.memopt_uring_remove_file, self._ring)
        with self._gate:
            slots = self._slots.get(file)
            if slots and not self._closed:
                # Taken off the list and removed in one step of C: a KeyboardInterrupt does neither or both.
                deque(map(remove, iter(slots.pop, None)), maxlen=0)
            self._slots.pop(file, None)

    def set_queue_depth(self, queue_depth: int) -> int:
        """Keep so many blocks in the kernel from now on, at most what the ring was opened for; return how many."""
        super().set_queue_depth(queue_depth)
        self._check_usable()
        self.queue_depth = min(queue_depth, self._max_depth)
        self._native.lib.memopt_uring_limit(self._ring, self.queue_depth)
        return self.queue_depth

    def register_buffers(self, buffers: Sequence[Buffer]) -> str:
        """Map long-lived buffers once; return "" or why that was not possible (often the limit of locked memory).

        They are kept alive until they are unregistered: the kernel would go on using the old pages of an address that
        was mapped anew.
        """
        self._check_usable()
        for buffer in buffers:
            view = view_of(buffer, writable=False)
            self._registered.append(view)
            rc = (
                self._native.lib.memopt_uring_add_buffer(self._ring, view.address, view.nbytes)
                if view.nbytes
                else 0
            )
            if rc < 0:
                return f"{os.strerror(-rc)} while registering {view.nbytes} bytes (see `ulimit -l`)"
        return ""

    def unregister_buffers(self) -> None:
        """Forget all registered buffers. Transfers in flight are waited for first."""
        self._check_usable()
        for ticket in self._snapshot():
            if ticket.released:
                ticket._finished(None)
        self._native.lib.memopt_uring_remove_buffers(self._ring)
        self._registered.clear()

    def counters(self) -> UringCounters:
        """Return what the ring did so far."""
        out = self._native.ffi.new("memopt_uring_counters *")
        self._native.lib.memopt_uring_count(self._ring, out)
        return UringCounters(**{name: int(getattr(out, name)) for name in UringCounters.__slots__})

    def inject(self, result: int = 0, *, skip: int = 0, count: int = 0, max_bytes: int = 0) -> None:
        """For tests: let ``count`` completions report ``result``, and cap what one block asks of the kernel."""
        self._native.lib.memopt_uring_inject(self._ring, result, skip, count, max_bytes)

    def _shut_down(self) -> None:
        self._slots.clear()
        _release(self._native, self._ring, self._pid)
        self._registered.clear()
        self._finalizer.detach()


def _check_word(when_over: RawBuffer | None) -> None:
    if when_over is not None and (when_over.nbytes != 4 or when_over.address % 4):
        raise ValueError(
            f"when_over={when_over} is no aligned 32-bit word; pass RawBuffer(address=, nbytes=4, owner=)"
        )


def _why_refused(code: int) -> str:
    """Return what usually makes the kernel answer a new ring with ``code``."""
    with contextlib.suppress(OSError):
        disabled = _DISABLED.read_text().strip()
        if code == errno.EPERM and disabled != "0":
            return f": kernel.io_uring_disabled is {disabled} (sysctl kernel.io_uring_disabled=0 allows it)"
    why = _REASONS.get(code)
    return f": {why}" if why else ""


def _release(native: Any, ring: Any, pid: int) -> None:
    """Free the ring, once; in a forked child only the child's descriptors, since the thread stayed with the parent."""
    if os.getpid() == pid:
        native.lib.memopt_uring_close(ring)
    else:
        native.lib.memopt_uring_abandon(ring)


def prove(engine: Engine, directory: str | os.PathLike[str] | None) -> None:
    """Write one block and read it back, in `directory` or in an anonymous memory file.

    Raises:
        OSError: that failed, or the block that came back is another one.
    """
    if directory is None:
        fd = os.memfd_create("memopt-probe", os.MFD_CLOEXEC)
        file = IoFile(path="(memory file)", buffered_fd=fd)
    else:
        file = create_unlinked(directory)
    pattern, back = os.urandom(file.unit_bytes), bytearray(file.unit_bytes)
    try:
        engine.write(file, 0, pattern).wait()
        engine.read(file, 0, back).wait()
    finally:
        engine.detach(file)
        file.close()
    if back != pattern:
        raise OSError(errno.EIO, "the block that came back is not the one that was written")
