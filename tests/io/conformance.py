"""What every storage engine must do; ``test_threads.py`` and ``test_uring.py`` instantiate it."""

from __future__ import annotations

import contextlib
import errno
import gc
import mmap
import os
import signal
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memopt.io import RawBuffer, Transfer, create_unlinked, open_file
from memopt.types.errors import IoEngineUnavailable

KIB = 1024
MIB = 1 << 20


def pages(nbytes: int, *, shift: int = 0, fill: bytes | None = None) -> memoryview:
    """A view of ``nbytes`` that starts ``shift`` bytes behind a page boundary, with random or given bytes."""
    view = memoryview(mmap.mmap(-1, nbytes + shift + 1))[shift : shift + nbytes]
    view[:] = os.urandom(nbytes) if fill is None else fill
    return view


def on_disk(file, offset: int, nbytes: int) -> bytes:
    """What an ordinary read finds, independently of the engine."""
    return os.pread(file.buffered_fd, nbytes, offset)


def num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def open_fds() -> set[str]:
    return {str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()}


def soon(condition) -> bool:
    """Whether ``condition`` comes true within ten seconds: a joined thread leaves /proc a moment later."""
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


OPERATION = st.tuples(
    st.sampled_from(["read", "write"]),
    st.one_of(st.integers(0, 60 * KIB), st.integers(0, 14).map(lambda i: i * 4 * KIB)),
    st.one_of(st.integers(0, 20 * KIB), st.integers(0, 5).map(lambda i: i * 4 * KIB)),
    st.sampled_from([0, 0, 0, 1, 512, 513]),
    st.integers(0, 255),
)


class EngineConformance:
    """Subclasses give ``make``, ``cap`` (short transfers), ``fail`` (one result) and ``held`` (nothing finishes)."""

    def make(self, queue_depth: int = 8):
        raise NotImplementedError

    def cap(self, engine, max_bytes: int) -> None:
        raise NotImplementedError

    def fail(self, engine, result: int, *, skip: int = 0, count: int = 1) -> None:
        """Let ``count`` system calls after ``skip`` others return ``result`` (negative errno, or a byte count)."""
        raise NotImplementedError

    def held(self, engine) -> contextlib.AbstractContextManager[None]:
        raise NotImplementedError

    @pytest.fixture
    def engine(self):
        engine = self.make()
        yield engine
        engine.close()

    @pytest.fixture
    def file(self, tmp_path, engine):
        file = create_unlinked(tmp_path)
        yield file
        engine.detach(file)
        file.close()

    # ------------------------------------------------------------------------------------------- bytes

    def test_empty_batch_and_empty_buffer(self, engine, file):
        for ticket in (
            engine.submit([]),
            engine.write(file, 0, b""),
            engine.read(file, 10**9, bytearray()),
        ):
            ticket.wait()
            assert ticket.done()
        assert os.fstat(file.buffered_fd).st_size == 0

    @pytest.mark.parametrize("shift", [0, 512, 1])
    @pytest.mark.parametrize("offset", [0, 1, 4096, 5000])
    @pytest.mark.parametrize("nbytes", [1, 511, 4095, 4096, 4097, 12288, 100_001, 3 * MIB + 77])
    def test_round_trip_leaves_neighbours_alone(self, engine, file, nbytes, offset, shift):
        background = os.urandom(offset + nbytes + 9000)
        os.pwrite(file.buffered_fd, background, 0)
        data = pages(nbytes, shift=shift)
        engine.write(file, offset, data).wait()
        expected = background[:offset] + bytes(data) + background[offset + nbytes :]
        assert on_disk(file, 0, len(expected) + 1) == expected
        back = pages(nbytes + 2, shift=shift, fill=bytes(nbytes + 2))
        engine.read(file, offset, back[1:-1]).wait()
        assert bytes(back) == b"\0" + bytes(data) + b"\0"

    def test_padded_odd_length_is_direct(self, engine, file):
        if not file.is_direct:
            pytest.skip(f"no direct I/O here: {file.direct_reason}")
        os.pwrite(file.buffered_fd, b"x" * 16384, 0)
        data = pages(5001)
        engine.write(file, 4096, data, padded=True).wait()
        back = pages(5001, fill=bytes(5001))
        engine.read(file, 4096, back, padded=True).wait()
        assert back == data
        assert on_disk(file, 4096, 5001) == data
        assert on_disk(file, 0, 4096) == b"x" * 4096
        assert on_disk(file, 12288, 4096) == b"x" * 4096
        stats = engine.stats()
        assert (stats.buffered_bytes, stats.written_bytes, stats.read_bytes) == (0, 5001, 5001)
        assert engine.bounces.num_in_use == 0

    def test_kinds_of_buffers(self, engine, file):
        array = np.arange(3000, dtype=np.int32).reshape(30, 100)
        engine.write(file, 0, array).wait()
        back = np.zeros_like(array)
        engine.read(
            file, 0, RawBuffer(address=back.ctypes.data, nbytes=back.nbytes, owner=back)
        ).wait()
        assert (back == array).all()
        fortran = np.zeros((30, 100), dtype=np.int32, order="F")
        with pytest.raises(ValueError, match="not contiguous"):
            engine.read(file, 0, fortran)
        with pytest.raises(ValueError, match="read-only"):
            engine.read(file, 0, b"1234")
        with pytest.raises(TypeError):
            engine.write(file, 0, 5)
        with pytest.raises(ValueError, match="negative"):
            engine.write(file, -1, b"1")
        assert engine.stats().num_in_flight == 0

    def test_batch_larger_than_queue(self, tmp_path):
        with (
            self.make(queue_depth=2) as engine,
            contextlib.closing(create_unlinked(tmp_path)) as file,
        ):
            parts = [pages(4096 * (1 + i % 3)) for i in range(200)]
            offsets = np.cumsum([0] + [len(p) for p in parts])
            engine.submit(
                [
                    Transfer(kind="write", file=file, offset=int(o), buffer=p)
                    for o, p in zip(offsets, parts, strict=False)
                ]
            ).wait()
            backs = [pages(len(p), fill=bytes(len(p))) for p in parts]
            engine.submit(
                [
                    Transfer(kind="read", file=file, offset=int(o), buffer=b)
                    for o, b in zip(offsets, backs, strict=False)
                ]
            ).wait()
            assert all(a == b for a, b in zip(parts, backs, strict=True))
            engine.detach(file)

    def test_many_tickets_from_many_threads(self, engine, file):
        failures = []

        def work(number: int) -> None:
            try:
                for step in range(20):
                    base = (number * 20 + step) * 64 * KIB
                    data = pages(20_000 + 997 * number, shift=number % 2 * 512)
                    engine.write(file, base, data).wait()
                    back = bytearray(len(data))
                    engine.read(file, base, back).wait()
                    assert back == data
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert engine.stats().num_failed == 0

    # -------------------------------------------------------------------------- short transfers, errors

    @pytest.mark.parametrize("max_bytes", [4096, 1000, 13000])
    def test_short_transfers_are_resumed(self, engine, file, max_bytes):
        data = pages(70_000)
        self.cap(engine, max_bytes)
        engine.write(file, 8192, data).wait()
        back = pages(70_000, fill=bytes(70_000))
        engine.read(file, 8192, back).wait()
        self.cap(engine, 0)
        assert back == data
        assert on_disk(file, 8192, 70_000) == data

    @pytest.mark.parametrize("code", [errno.EINTR, errno.EAGAIN])
    def test_interrupted_calls_are_repeated(self, engine, file, code):
        data = pages(3 * MIB)
        self.fail(engine, -code, count=3)
        engine.write(file, 0, data).wait()
        self.fail(engine, -code, skip=1, count=2)
        back = bytearray(3 * MIB)
        engine.read(file, 0, back).wait()
        assert back == data

    def test_refused_alignment_goes_on_buffered(self, engine, file):
        data = pages(64 * KIB)
        self.fail(engine, -errno.EINVAL, count=1)
        if not file.is_direct:
            pytest.skip(f"no direct I/O here: {file.direct_reason}")
        engine.write(file, 0, data).wait()
        assert on_disk(file, 0, 64 * KIB) == data

    @pytest.mark.parametrize("kind", ["read", "write"])
    @pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
    def test_error_has_errno_path_offset(self, engine, file, code, kind):
        data = pages(8192)
        os.pwrite(file.buffered_fd, data, 4096)
        self.fail(engine, -code)
        ticket = engine.submit([Transfer(kind=kind, file=file, offset=4096, buffer=data)])
        for _ in range(2):
            with pytest.raises(OSError, match=f"{kind} at offset (4096|8192)") as caught:
                ticket.wait()
            assert caught.value.errno == code
            assert caught.value.filename == file.path
            assert "no byte" not in str(caught.value)  # that is another failure
            # with small blocks both fail, and which of them ends first is the kernel's choice
            assert caught.value.offset in (4096, 8192)
            assert caught.value.operation == kind
        assert ticket.done()
        engine.drain()  # it was waited for: not raised again
        engine.write(file, 0, data).wait()
        assert engine.stats().num_failed == 1

    def test_a_kept_error_keeps_no_frame(self, engine, file):
        """Its traceback would hold the caller's variables, the graph of a training step among them."""

        class Variable:
            pass

        def caller(ticket) -> None:
            variable = Variable()
            frames.append(weakref.ref(variable))
            ticket.wait()

        frames: list[weakref.ref] = []
        self.fail(engine, -errno.EIO)
        ticket = engine.write(file, 0, pages(4096))
        for _ in range(2):
            with contextlib.suppress(OSError):
                caller(ticket)
        assert [frame() for frame in frames] == [None, None]

    def test_a_real_errno_from_the_kernel(self, engine, tmp_path):
        path = tmp_path / "readonly"
        path.write_bytes(b"x" * 8192)
        with contextlib.closing(open_file(path, writable=False)) as file:
            with pytest.raises(OSError, match="write at offset 0") as caught:
                engine.write(file, 0, pages(4096)).wait()
            assert caught.value.errno == errno.EBADF
            engine.detach(file)
        assert path.read_bytes() == b"x" * 8192

    @pytest.mark.parametrize("shift", [0, 1])
    @pytest.mark.parametrize("size", [0, 4096, 5000, 8192])
    def test_read_past_the_end_is_an_error(self, engine, file, size, shift):
        os.pwrite(file.buffered_fd, b"y" * size, 0)
        with pytest.raises(OSError, match="file ends") as caught:
            engine.read(file, 0, pages(3 * 4096, shift=shift)).wait()
        assert caught.value.errno == errno.ENODATA
        assert (
            size <= caught.value.offset < 3 * 4096
        )  # of the blocks that fail, any may be the first

    def test_write_that_writes_nothing_is_an_error(self, engine, file):
        self.fail(engine, 0)
        with pytest.raises(OSError, match="wrote no byte") as caught:
            engine.write(file, 0, pages(4096)).wait()
        assert caught.value.errno == errno.EIO

    def test_first_error_of_a_batch_wins_and_the_rest_is_let_go(self, tmp_path):
        with (
            self.make(queue_depth=1) as engine,
            contextlib.closing(create_unlinked(tmp_path)) as file,
        ):
            self.fail(engine, -errno.EIO, skip=2)
            ticket = engine.submit(
                [
                    Transfer(kind="write", file=file, offset=i * 4096, buffer=pages(4096))
                    for i in range(40)
                ]
            )
            with pytest.raises(OSError, match="offset 8192"):
                ticket.wait()
            data = pages(4096)
            engine.write(file, 0, data).wait()
            assert on_disk(file, 0, 4096) == data
            engine.detach(file)

    def test_forgotten_failure_is_raised_by_drain(self, engine, file):
        self.fail(engine, -errno.EIO)
        engine.write(file, 0, pages(4096))
        with pytest.raises(OSError, match="write at offset 0"):
            engine.drain()
        engine.drain()

    def test_forgotten_failure_is_raised_by_close_after_release(self, tmp_path):
        before = num_threads()
        engine = self.make()
        with contextlib.closing(create_unlinked(tmp_path)) as file:
            self.fail(engine, -errno.ENOSPC)
            engine.write(file, 0, pages(4096))
            with pytest.raises(OSError, match="No space left"):
                engine.close()
        assert soon(lambda: num_threads() <= before)
        engine.close()

    def test_exit_keeps_the_exception_of_the_body(self, tmp_path):
        def body():
            with contextlib.closing(create_unlinked(tmp_path)) as file, self.make() as engine:
                self.fail(engine, -errno.EIO)
                engine.write(file, 0, pages(4096))
                raise KeyError("the body's own")

        with pytest.raises(KeyError, match="the body's own"):
            body()

    # ------------------------------------------------------------------------------------- waiting, life

    def test_timeout_poll_and_late_finish(self, engine, file):
        data = pages(8192)
        with self.held(engine):
            ticket = engine.write(file, 0, data)
            start = time.monotonic()
            with pytest.raises(TimeoutError):
                ticket.wait(timeout_s=0.25)
            assert 0.2 < time.monotonic() - start < 2
            assert not ticket.done()
            assert not engine.poll(ticket)
            assert engine.stats().num_in_flight == 1
        engine.wait(ticket, timeout_s=20)
        assert on_disk(file, 0, 8192) == data

    def test_keyboard_interrupt_while_waiting(self, engine, file):
        def interrupt(*_):
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            with self.held(engine):
                ticket = engine.write(file, 0, pages(8192))
                signal.setitimer(signal.ITIMER_REAL, 0.2)
                start = time.monotonic()
                with pytest.raises(KeyboardInterrupt):
                    ticket.wait()
                assert time.monotonic() - start < 2
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        ticket.wait(timeout_s=20)

    def test_close_finishes_what_is_in_flight(self, tmp_path):
        before = num_threads()
        with contextlib.closing(create_unlinked(tmp_path)) as file:
            engine = self.make()
            data = [pages(MIB) for _ in range(24)]
            for i, part in enumerate(data):
                engine.write(file, i * MIB, part)
            engine.close()
            assert all(on_disk(file, i * MIB, MIB) == part for i, part in enumerate(data))
            for call in (lambda: engine.write(file, 0, b"1"), engine.drain):
                with pytest.raises(ValueError, match="closed"):
                    call()
        assert soon(lambda: num_threads() <= before)

    def test_buffers_live_as_long_as_the_transfer_and_no_longer(self, engine, file):
        class Owner:
            def __init__(self, nbytes: int) -> None:
                self.memory = np.frombuffer(os.urandom(nbytes), dtype=np.uint8).copy()

        owner = Owner(MIB)
        expected = self_bytes = owner.memory.tobytes()
        alive = weakref.ref(owner)
        with self.held(engine):
            ticket = engine.write(
                file, 0, RawBuffer(address=owner.memory.ctypes.data, nbytes=MIB, owner=owner)
            )
            del owner
            gc.collect()
            assert alive() is not None
        ticket.wait(timeout_s=20)
        assert on_disk(file, 0, MIB) == expected == self_bytes
        gc.collect()
        assert alive() is None, gc.get_referrers(alive())

    def test_dropped_tickets_still_move_their_bytes(self, engine, file):
        expected = []
        for i in range(30):
            data = pages(256 * KIB)
            expected.append(bytes(data))
            engine.write(file, i * 256 * KIB, data)
            del data
            gc.collect(0)
        engine.drain()
        assert all(on_disk(file, i * 256 * KIB, 256 * KIB) == e for i, e in enumerate(expected))

    def test_memory_can_be_unmapped_after_the_wait(self, engine, file):
        for fails in (False, True):
            memory = mmap.mmap(-1, 64 * KIB)
            if fails:
                self.fail(engine, -errno.EIO)
            ticket = engine.write(file, 0, memory)
            with contextlib.suppress(OSError):
                ticket.wait()
            memory.close()  # BufferError if anybody still held a view

    def test_dropped_engine_leaves_nothing(self, tmp_path):
        threads, fds = num_threads(), open_fds()
        engine = self.make()
        engine.close()
        engine = self.make()
        with contextlib.closing(create_unlinked(tmp_path)) as file:
            engine.write(file, 0, pages(4096)).wait()
            engine.detach(file)
        del engine, file
        gc.collect()
        assert soon(lambda: num_threads() <= threads)
        assert soon(lambda: open_fds() == fds)

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_forked_child_can_only_close(self, engine, file):
        data = [pages(MIB) for _ in range(8)]
        tickets = [engine.write(file, i * MIB, part) for i, part in enumerate(data)]
        child = os.fork()
        if child == 0:
            status = 1
            with contextlib.suppress(BaseException):
                try:
                    engine.write(file, 0, b"from the child")
                except (IoEngineUnavailable, ValueError):
                    signal.alarm(20)
                    engine.close()
                    status = 0
            os._exit(status)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        for ticket in tickets:
            ticket.wait(timeout_s=20)
        engine.write(file, 0, data[1]).wait()
        assert on_disk(file, 0, 2 * MIB) == bytes(data[1]) * 2

    # --------------------------------------------------------------------------------------------- model

    def _against_model(self, engine, file, operations, batch: int) -> None:
        """Run ``operations`` in batches of disjoint ranges and compare each byte with an array in memory."""
        os.ftruncate(file.buffered_fd, 0)
        os.ftruncate(file.buffered_fd, 96 * KIB)
        model = bytearray(96 * KIB)
        waiting: list[tuple[object, memoryview, bytes | None]] = []
        busy: list[tuple[int, int]] = []
        for kind, offset, nbytes, shift, byte in operations:
            overlaps = any(b < offset + nbytes and offset < e for b, e in busy)
            if overlaps or len(waiting) >= batch:
                self._settle_model(waiting)
                busy.clear()
            view = pages(nbytes, shift=shift, fill=bytes([byte]) * nbytes)
            if kind == "write":
                model[offset : offset + nbytes] = view
                waiting.append((engine.write(file, offset, view), view, None))
            else:
                expected = bytes(model[offset : offset + nbytes])
                waiting.append((engine.read(file, offset, view), view, expected))
            busy.append((offset, offset + nbytes))
        self._settle_model(waiting)
        assert on_disk(file, 0, len(model) + 1) == model

    @staticmethod
    def _settle_model(waiting) -> None:
        for ticket, view, expected in waiting:
            ticket.wait()
            assert expected is None or view == expected
        waiting.clear()

    @settings(
        max_examples=15,
        deadline=None,
        derandomize=True,
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.differing_executors,
        ],
    )
    @given(operations=st.lists(OPERATION, min_size=20, max_size=40), batch=st.integers(1, 12))
    def test_random_operations_against_model(self, engine, file, operations, batch):
        self._against_model(engine, file, operations, batch)

    @pytest.mark.slow
    @settings(
        max_examples=200,
        deadline=None,
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.differing_executors,
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.large_base_example,
        ],
    )
    @given(operations=st.lists(OPERATION, min_size=50, max_size=80), batch=st.integers(1, 12))
    def test_ten_thousand_random_operations_against_model(self, engine, file, operations, batch):
        self._against_model(engine, file, operations, batch)
