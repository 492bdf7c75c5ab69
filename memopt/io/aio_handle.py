"""DeepSpeed's ``aio_handle``, torch-free, with errors that cannot be overlooked.

DeepSpeed's NVMe swappers call a handle of seven methods (constructor with five settings, ``new_cpu_locked_tensor``,
``free_cpu_locked_tensor``, ``is_pinned``, ``async_pread``, ``async_pwrite``, ``wait``). Its own handle never looks at
the result of a completion: a tensor of an odd size, or a full disk, counts as written, and a later read ends the
process by a C assertion (DeepSpeed 0.19.8, ``csrc/aio``). This one moves every byte or raises :class:`OSError` from
:meth:`AioHandle.wait` (or from the synchronous calls), after everything in flight has ended.

Here buffers are of the buffer protocol or :class:`memopt.io.RawBuffer`; the tensor-facing part is
``memopt/integrations/deepspeed_aio.py``.
"""

from __future__ import annotations

import logging
import operator
import threading
from dataclasses import dataclass
from typing import Any

from memopt.io.buffers import Buffer
from memopt.io.engine import Engine, EngineName, Ticket, open_engine
from memopt.io.files import IoFile, open_file
from memopt.io.pieces import Kind, Transfer

__all__ = ["AioHandle"]

_ALIGNMENT_BYTES = 4096
_MAX_BLOCK_BYTES = 1 << 30
_MAX_QUEUE_DEPTH = 4096
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Operation:
    ticket: Ticket
    file: IoFile


class AioHandle:
    """Reads and writes of named files, asynchronous until :meth:`wait`. Thread-safe.

    Args:
        block_size: bytes per block given to the kernel, rounded up to 4096.
        queue_depth: blocks in flight, 1 to 4096.
        single_submit: has no effect (blocks are always submitted in batches); asking for it is noted in the log.
        overlap_events: has no effect (submission and completion always overlap).
        intra_op_parallelism: has no effect with io_uring (one ring fills the disk), and none on sizes or alignment.
        engine: as :func:`memopt.io.open_engine`; why ``"auto"`` fell back is a warning in the log.

    Raises:
        ValueError: an unknown engine, or a setting that cannot be.
        IoEngineUnavailable: the engine named explicitly cannot run here.
    """

    def __init__(
        self,
        block_size: int = 1 << 20,
        queue_depth: int = 128,
        single_submit: bool = False,
        overlap_events: bool = False,
        intra_op_parallelism: int = 1,
        *,
        engine: EngineName = "auto",
    ) -> None:
        block_size = _checked("block_size", block_size, _MAX_BLOCK_BYTES)
        queue_depth = _checked("queue_depth", queue_depth, _MAX_QUEUE_DEPTH)
        intra_op_parallelism = _checked("intra_op_parallelism", intra_op_parallelism)
        if single_submit:
            _log.warning("single_submit has no effect: memopt submits blocks in batches")
        self._settings = (
            block_size,
            queue_depth,
            single_submit,
            overlap_events,
            intra_op_parallelism,
        )
        self.engine: Engine = _open(engine, queue_depth, block_size)
        self._lock = threading.Lock()
        self._operations: list[_Operation] = []

    def get_block_size(self) -> int:
        """Return the block size asked for."""
        return self._settings[0]

    def get_queue_depth(self) -> int:
        """Return the queue depth asked for."""
        return self._settings[1]

    def get_single_submit(self) -> bool:
        """Return the setting as given; it has no effect."""
        return self._settings[2]

    def get_overlap_events(self) -> bool:
        """Return the setting as given; it has no effect."""
        return self._settings[3]

    def get_intra_op_parallelism(self) -> int:
        """Return the setting as given; it has no effect with io_uring."""
        return self._settings[4]

    def get_alignment(self) -> int:
        """Return the size at whose multiples transfers are fastest; every other size works too."""
        return _ALIGNMENT_BYTES

    def async_pread(self, buffer: Any, filename: str, file_offset: int = 0) -> int:
        """Start filling ``buffer`` from ``file_offset`` of the file; return 0.

        Raises:
            OSError: the file cannot be opened. Missing bytes and failures of the disk are raised by :meth:`wait`.
        """
        self._start("read", buffer, filename, file_offset)
        return 0

    def async_pwrite(self, buffer: Any, filename: str, file_offset: int = 0) -> int:
        """Start writing ``buffer`` at ``file_offset`` of the file, which is created where missing; return 0.

        Raises:
            OSError: the file cannot be opened. Failures of the disk, and a full one, are raised by :meth:`wait`.
        """
        self._start("write", buffer, filename, file_offset)
        return 0

    def wait(self) -> int:
        """Wait for everything started since the last wait; return how many operations that were.

        Raises:
            OSError: the first that failed (errno, path, offset), after all have ended and their files are closed.
        """
        with self._lock:
            operations, self._operations = self._operations, []
        first: OSError | None = None
        num_ended = 0
        try:
            for operation in operations:
                try:
                    operation.ticket.wait()
                except OSError as error:
                    first = first or error
                operation.file.close()
                num_ended += 1
        finally:  # a KeyboardInterrupt leaves the others in flight, to be waited for by the next call
            with self._lock:
                self._operations = operations[num_ended:] + self._operations
        if first is not None:
            raise first
        return num_ended

    def sync_pread(self, buffer: Any, filename: str, file_offset: int = 0) -> int:
        """Fill ``buffer`` and return 1; raises as :meth:`wait`."""
        return self._now("read", buffer, filename, file_offset)

    def sync_pwrite(self, buffer: Any, filename: str, file_offset: int = 0) -> int:
        """Write ``buffer`` and return 1; raises as :meth:`wait`."""
        return self._now("write", buffer, filename, file_offset)

    def read(self, buffer: Any, filename: str, validate: bool = False, file_offset: int = 0) -> int:
        """Same as :meth:`sync_pread`; ``validate`` has no effect, since every byte is always accounted for."""
        del validate
        return self.sync_pread(buffer, filename, file_offset)

    def write(
        self, buffer: Any, filename: str, validate: bool = False, file_offset: int = 0
    ) -> int:
        """Same as :meth:`sync_pwrite`; ``validate`` has no effect."""
        del validate
        return self.sync_pwrite(buffer, filename, file_offset)

    def pread(
        self, buffer: Any, filename: str, validate: bool, async_op: bool, file_offset: int = 0
    ) -> int:
        """Read, and wait for it unless ``async_op``; DeepSpeed passes these by position."""
        del validate
        return (self.async_pread if async_op else self.sync_pread)(buffer, filename, file_offset)

    def pwrite(
        self, buffer: Any, filename: str, validate: bool, async_op: bool, file_offset: int = 0
    ) -> int:
        """Write, and wait for it unless ``async_op``."""
        del validate
        return (self.async_pwrite if async_op else self.sync_pwrite)(buffer, filename, file_offset)

    def close(self) -> None:
        """Wait for what is in flight and release the engine; a forked child waits for nothing.

        Raises:
            OSError: an operation that nobody waited for failed.
        """
        if self.engine.is_inherited:
            for operation in self._operations:
                operation.file.close()
            self.engine.close()
            return
        try:
            self.wait()
        finally:
            self.engine.close()

    def _as_buffer(self, buffer: Any) -> Buffer:
        """Turn what the caller passes into a buffer; the tensor-facing handle overrides this."""
        return buffer

    def _begin(self, kind: Kind, buffer: Any, filename: str, offset: int) -> _Operation:
        memory = self._as_buffer(buffer)
        file = open_file(filename, writable=kind == "write", create=kind == "write")
        file.is_long_lived = False
        try:
            ticket = self.engine.submit(
                [Transfer(kind=kind, file=file, offset=offset, buffer=memory)]
            )
        except BaseException:
            file.close()
            raise
        return _Operation(ticket, file)

    def _start(self, kind: Kind, buffer: Any, filename: str, offset: int) -> None:
        operation = self._begin(kind, buffer, filename, offset)
        with self._lock:
            self._operations.append(operation)

    def _now(self, kind: Kind, buffer: Any, filename: str, offset: int) -> int:
        operation = self._begin(kind, buffer, filename, offset)
        try:
            operation.ticket.wait()
        except OSError:
            operation.file.close()
            raise
        except BaseException:  # a KeyboardInterrupt: its descriptors must stay until it is over
            with self._lock:
                self._operations.append(operation)
            raise
        operation.file.close()
        return 1


def _checked(name: str, value: Any, most: int | None = None) -> int:
    """Return a setting that counts something; DeepSpeed reads them from JSON."""
    is_whole = hasattr(value, "__index__") and not isinstance(value, bool)  # numpy's are too
    if not is_whole or value < 1 or (most is not None and value > most):
        allowed = "of at least 1" if most is None else f"from 1 to {most}"
        raise ValueError(f"{name}={value!r} must be an integer {allowed}")
    return operator.index(value)


def _open(name: EngineName, queue_depth: int, block_size: int) -> Engine:
    """Open an engine with DeepSpeed's block size; a fallback is told, since no report has it."""
    block_bytes = -(-block_size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    engine = open_engine(name, queue_depth=queue_depth, block_bytes=block_bytes)
    if engine.reason:
        _log.warning("aio_handle uses the %s engine: %s", engine.name, engine.reason)
    return engine
