"""What a forked child may do with what it inherited in the middle of transfers: close it, and nothing that waits."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable

import pytest

from memopt.io import ExtentStore, open_engine
from memopt.io.aio_handle import AioHandle
from memopt.memory.pinned import HostPool
from memopt.types.errors import IoEngineUnavailable
from tests.io.conformance import MIB, open_fds, pages
from tests.io.test_uring import make_engine

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(params=["threads", "io_uring"])
def name(request):
    if request.param == "io_uring":
        make_engine().close()
    return request.param


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked child that is killed after ten seconds; return its exit status (0: no exception)."""
    child = os.fork()
    if child == 0:
        status = 1
        signal.alarm(10)
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_store(name, tmp_path):
    data = pages(8 * MIB)
    with ExtentStore([(tmp_path, 128 * MIB)], name) as store:
        extents = [store.alloc(len(data)) for _ in range(12)]
        tickets = [store.write(extent, data) for extent in extents]

        def work() -> None:
            for call in (tickets[-1].wait, lambda: store.read(extents[-1], bytearray(1))):
                with pytest.raises(IoEngineUnavailable, match="forked child"):
                    call()
            store.close()
            assert not [fd for fd in open_fds() if "spill" in fd or str(tmp_path) in fd]

        assert in_child(work) == 0
        back = bytearray(len(data))
        for extent in extents:  # the parent's transfers went on
            store.read(extent, back).wait()
            assert back == data


def test_aio_handle(name, tmp_path):
    handle, data = AioHandle(engine=name), pages(4 * MIB)
    for i in range(20):
        handle.async_pwrite(data, str(tmp_path / f"{i}.swp"))

    def work() -> None:
        handle.close()
        assert not [fd for fd in open_fds() if fd.endswith(".swp")]

    assert in_child(work) == 0
    assert handle.wait() == 20
    assert all((tmp_path / f"{i}.swp").read_bytes() == data for i in range(20))
    handle.close()


def test_locks_that_other_threads_hold_at_the_fork(name, tmp_path):
    """The child's copy of a lock is held for ever when its holder stayed with the parent."""
    store = ExtentStore([(tmp_path, MIB)], name)
    locks = [
        store._lock,
        store._closing,
        store.engine._lock,
        store.engine._gate,
        store.engine._closing,
    ]
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            over.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(20)
    try:
        assert in_child(store.close) == 0
    finally:
        over.set()
        thread.join()
        store.close()


def test_host_pool(monkeypatch):
    """Its threads are faulting memory in when the process forks."""
    from memopt.memory._slab import Slab

    real = Slab.populate
    monkeypatch.setattr(Slab, "populate", lambda *a: (time.sleep(0.5), real(*a)))
    with HostPool(8 * MIB, False) as pool:
        pool.reserve({MIB: 4})
        assert in_child(pool.close) == 0
        pool.settle()


def test_an_engine_can_be_opened_in_the_child(name, tmp_path):
    engine = open_engine(name)

    def work() -> None:
        with open_engine(name) as own, ExtentStore([(tmp_path, MIB)], own) as store:
            extent, back = store.alloc(5000), bytearray(5000)
            store.write(extent, pages(5000, fill=b"c" * 5000)).wait()
            store.read(extent, back).wait()
            assert back == b"c" * 5000
        engine.close()

    assert in_child(work) == 0
    engine.close()
