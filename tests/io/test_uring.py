from __future__ import annotations

import contextlib
import errno
import mmap
import os
import signal
from pathlib import Path

import pytest

from memopt.io import create_unlinked
from memopt.types.errors import IoEngineUnavailable
from tests.io.conformance import MIB, EngineConformance, on_disk, pages


def make_engine(**options):
    """An engine, or a skip with the reason; with MEMOPT_REQUIRE_NATIVE=1 a missing native part fails the test."""
    from memopt.io.uring import UringEngine

    try:
        return UringEngine.open(**options)
    except IoEngineUnavailable as error:
        if os.environ.get("MEMOPT_REQUIRE_NATIVE", "") not in ("", "0") and "missing" in str(error):
            raise
        pytest.skip(str(error))


class TestUringEngine(EngineConformance):
    def make(self, queue_depth: int = 8):
        return make_engine(queue_depth=queue_depth)

    def cap(self, engine, max_bytes):
        engine.inject(max_bytes=max_bytes)

    def fail(self, engine, result, *, skip=0, count=1):
        engine.inject(result, skip=skip, count=count)

    @contextlib.contextmanager
    def held(self, engine):
        engine.inject(-errno.EAGAIN, count=2**31)
        try:
            yield
        finally:
            engine.inject()


class TestSmallBlocks(TestUringEngine):
    """The same with blocks of one page: every transfer is many blocks and the queue is always full."""

    def make(self, queue_depth: int = 8):
        return make_engine(queue_depth=queue_depth, block_bytes=4096)


@pytest.mark.slow
class TestSqpoll(TestUringEngine):
    def make(self, queue_depth: int = 8):
        return make_engine(queue_depth=queue_depth, sqpoll=True)


def test_short_transfers_were_really_short(tmp_path):
    with (
        make_engine(queue_depth=4) as engine,
        contextlib.closing(create_unlinked(tmp_path)) as file,
    ):
        before = engine.counters()
        engine.inject(max_bytes=4096)
        engine.write(file, 0, pages(64 * 1024)).wait()
        after = engine.counters()
        assert after.num_resumed - before.num_resumed == 15
        engine.detach(file)


def test_registered_buffers_are_used_and_forgotten(tmp_path):
    memory = mmap.mmap(-1, 4 * MIB)
    memory[:] = os.urandom(4 * MIB)
    with (
        make_engine(queue_depth=4) as engine,
        contextlib.closing(create_unlinked(tmp_path)) as file,
    ):
        reason = engine.register_buffers([memory])
        if reason:
            pytest.skip(reason)
        before = engine.counters().num_fixed_buffers
        engine.write(file, 0, memory).wait()
        assert engine.counters().num_fixed_buffers - before == 4
        engine.write(file, 0, pages(4096)).wait()  # other memory in between
        back = memoryview(memory)[MIB : 2 * MIB]
        back[:] = bytes(MIB)
        engine.read(file, 2 * MIB, back).wait()
        assert engine.counters().num_fixed_buffers - before == 5
        assert back == on_disk(file, 2 * MIB, MIB)
        engine.unregister_buffers()
        engine.write(file, 0, memory).wait()
        assert engine.counters().num_fixed_buffers - before == 5
        back.release()
        engine.detach(file)


def test_registered_memory_lives_until_it_is_unregistered(tmp_path):
    """An address that is mapped anew would stand for the old pages: another tensor's bytes."""
    with make_engine() as engine:
        memory = mmap.mmap(-1, MIB)
        reason = engine.register_buffers([memory])
        if reason:
            pytest.skip(reason)
        with pytest.raises(BufferError):
            memory.close()
        engine.unregister_buffers()
        memory.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_keeps_no_registered_memory_pinned(tmp_path):
    """A data loader's worker holds the ring's descriptor for as long as it lives."""

    def pinned_kib() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmPin:")[1].split()[0])

    engine = make_engine()
    before = pinned_kib()
    reason = engine.register_buffers([mmap.mmap(-1, 8 * MIB)])
    if reason or pinned_kib() - before < 8192:
        pytest.skip(reason or "this kernel does not count registered memory as pinned")
    child = os.fork()
    if child == 0:
        signal.pause()
    try:
        engine.close()
        assert pinned_kib() == before
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_closed_file_gives_its_space_back(tmp_path):
    """A registered file keeps its blocks until it is forgotten."""

    def free_bytes() -> int:
        stat = os.statvfs("/dev/shm")
        return stat.f_bfree * stat.f_frsize

    with make_engine() as engine:
        before = free_bytes()
        file = create_unlinked("/dev/shm")
        engine.write(file, 0, pages(16 * MIB)).wait()
        assert before - free_bytes() > 12 * MIB
        engine.detach(file)
        file.close()
        assert before - free_bytes() < 4 * MIB


def test_more_files_than_the_table_holds(tmp_path):
    with make_engine() as engine, contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(contextlib.closing(create_unlinked(tmp_path))) for _ in range(140)
        ]
        parts = [pages(4096) for _ in files]
        for file, part in zip(files, parts, strict=True):
            engine.write(file, 0, part).wait()
        assert all(on_disk(f, 0, 4096) == p for f, p in zip(files, parts, strict=True))
        for file in files:
            engine.detach(file)


@pytest.mark.parametrize("block_bytes", [0, 100, 4097, 1 << 31])
def test_block_size_is_checked(block_bytes):
    from memopt.io.uring import UringEngine

    with pytest.raises(ValueError, match=f"block_bytes={block_bytes}"):
        UringEngine(block_bytes=block_bytes)
