"""Batches that are prepared now and released later by native code, and words that say when a batch is over.

The releases here come from a thread that Python knows nothing of, as a CUDA host function's do.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memopt.io import ExtentStore, RawBuffer, Transfer, create_unlinked, open_engine
from tests.io.conformance import KIB, MIB, num_threads, on_disk, open_fds, pages, soon
from tests.io.test_uring import make_engine


def call_in_c_thread(function: int, argument: int) -> None:
    """Run a C function in a thread made by pthread_create, and wait for it."""
    libc = ctypes.CDLL(None)
    thread = ctypes.c_ulong()
    libc.pthread_join.argtypes = (ctypes.c_ulong, ctypes.c_void_p)
    rc = libc.pthread_create(
        ctypes.byref(thread), None, ctypes.c_void_p(function), ctypes.c_void_p(argument)
    )
    assert rc == 0
    assert libc.pthread_join(thread, None) == 0


class Word:
    """A 32-bit word in plain memory, and what a GPU would see there."""

    def __init__(self) -> None:
        self.memory = np.zeros(16, dtype=np.uint32)
        self.buffer = RawBuffer(address=self.memory.ctypes.data + 8, nbytes=4, owner=self.memory)

    @property
    def value(self) -> int:
        assert self.memory[[0, 1, 3]].sum() == 0
        return int(self.memory[2])

    def wait(self) -> None:
        assert soon(lambda: self.value == 1)


@pytest.fixture(params=[1 << 20, 4096], ids=["1MiB", "4KiB"])
def engine(request):
    engine = make_engine(queue_depth=4, block_bytes=request.param)
    yield engine
    engine.close()


@pytest.fixture
def file(tmp_path, engine):
    file = create_unlinked(tmp_path)
    yield file
    engine.detach(file)
    file.close()


def write_of(file, data, offset=0, *, padded=False):
    return [Transfer(kind="write", file=file, offset=offset, buffer=data, padded=padded)]


def read_of(file, data, offset=0, *, padded=False):
    return [Transfer(kind="read", file=file, offset=offset, buffer=data, padded=padded)]


# ----------------------------------------------------------------------------------------------- release


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 5001, 100_001, 3 * MIB + 77])
@pytest.mark.parametrize("shift", [0, 1])
def test_nothing_moves_before_the_release_and_the_bytes_are_those_of_then(
    engine, file, nbytes, shift
):
    data = pages(nbytes, shift=shift, fill=b"x" * nbytes)
    ticket = engine.prepare(write_of(file, data, padded=True))
    assert not ticket.released
    with pytest.raises(TimeoutError):
        ticket.wait(timeout_s=0.02)
    assert os.fstat(file.buffered_fd).st_size == 0
    data[:] = os.urandom(nbytes)  # what a copy from the device does in between
    call_in_c_thread(*ticket.release_call())
    assert ticket.released
    ticket.wait(timeout_s=20)
    assert on_disk(file, 0, nbytes) == data
    assert engine.bounces.num_in_use == 0
    stats = engine.stats()
    assert (stats.num_in_flight, stats.num_failed, stats.written_bytes) == (0, 0, nbytes)


def test_release_from_python_and_twice(engine, file):
    data = pages(8192)
    ticket = engine.prepare(write_of(file, data))
    ticket.release()
    ticket.release()
    ticket.wait(timeout_s=20)
    ticket.release()
    assert on_disk(file, 0, 8192) == data


def test_empty_batch_is_over_when_it_is_released(engine):
    word = Word()
    ticket = engine.prepare([], when_over=word.buffer)
    assert not ticket.done()
    assert word.value == 0
    call_in_c_thread(*ticket.release_call())
    assert ticket.done()
    assert word.value == 1


def test_others_overtake_a_prepared_batch(engine, file):
    waiting = engine.prepare(write_of(file, pages(4096), 8192))
    data = pages(4096)
    engine.write(file, 0, data).wait(timeout_s=20)
    engine.drain()  # does not wait for what nobody has released
    assert on_disk(file, 0, 8193) == bytes(data)
    waiting.release()
    waiting.wait(timeout_s=20)


def test_a_dropped_ticket_still_moves_its_bytes_and_keeps_its_buffer(engine, file):
    expected, calls = [], []
    for i in range(20):
        data = pages(64 * KIB)
        expected.append(bytes(data))
        calls.append(engine.prepare(write_of(file, data, i * 64 * KIB)).release_call())
        del data
        gc.collect(0)
    for call in calls:
        call_in_c_thread(*call)
    engine.drain()
    assert all(on_disk(file, i * 64 * KIB, 64 * KIB) == e for i, e in enumerate(expected))


def test_python_holds_its_lock_all_the_time(engine, file):
    """Release, write and the word, while no other Python code can run: calls through PyDLL keep the lock."""
    libc = ctypes.PyDLL(None)
    thread, word, data = ctypes.c_ulong(), Word(), pages(MIB)
    ticket = engine.prepare(write_of(file, data), when_over=word.buffer)
    function, argument = (ctypes.c_void_p(part) for part in ticket.release_call())
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)
    try:
        assert libc.pthread_create(ctypes.byref(thread), None, function, argument) == 0
        for _ in range(100):
            libc.usleep(20_000)
            if word.memory[2]:
                break
        written = os.fstat(file.buffered_fd).st_size
    finally:
        sys.setswitchinterval(interval)
    assert written == MIB
    ctypes.CDLL(None).pthread_join(thread, None)
    ticket.wait()
    assert on_disk(file, 0, MIB) == data


# -------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize("nbytes", [1, 4096, 5001, 2 * MIB + 3])
@pytest.mark.parametrize("deferred", [False, True])
def test_the_word_is_set_after_the_last_byte(engine, file, nbytes, deferred):
    data = os.urandom(nbytes)
    os.pwrite(file.buffered_fd, data + bytes(8192), 0)
    for _ in range(10):
        back, word = pages(nbytes, fill=bytes(nbytes)), Word()
        if deferred:
            ticket = engine.prepare(read_of(file, back, padded=True), when_over=word.buffer)
            assert word.value == 0
            call_in_c_thread(*ticket.release_call())
        else:
            ticket = engine.submit(read_of(file, back, padded=True), when_over=word.buffer)
        while word.value == 0:
            pass
        assert back == data  # with no other synchronisation than the word
        assert ticket.done()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("kind", ["read", "write"])
def test_the_word_is_set_on_failure_and_the_error_surfaces(engine, file, code, kind):
    os.pwrite(file.buffered_fd, bytes(8192), 0)
    word = Word()
    engine.inject(-code, count=1)
    ticket = engine.prepare(
        [Transfer(kind=kind, file=file, offset=4096, buffer=pages(4096))], when_over=word.buffer
    )
    call_in_c_thread(*ticket.release_call())
    word.wait()
    with pytest.raises(OSError, match=f"{kind} at offset 4096") as caught:
        ticket.wait()
    assert (caught.value.errno, caught.value.filename) == (code, file.path)
    engine.drain()


def test_a_failure_that_nobody_waited_for_is_raised_once(engine, file):
    engine.inject(-errno.ENOSPC, count=1)
    call_in_c_thread(*engine.prepare(write_of(file, pages(4096))).release_call())
    with pytest.raises(OSError, match="No space left"):
        engine.drain()
    engine.drain()


@pytest.mark.parametrize("buffer", [(3, 4), (8, 8)])
def test_a_word_that_is_none_is_refused(engine, file, buffer):
    word = Word()
    address, nbytes = word.memory.ctypes.data + buffer[0], buffer[1]
    with pytest.raises(ValueError, match="32-bit word"):
        engine.submit(
            write_of(file, pages(4096)),
            when_over=RawBuffer(address=address, nbytes=nbytes, owner=word.memory),
        )
    assert engine.stats().num_in_flight == 0


def test_the_threads_engine_refuses(tmp_path):
    with open_engine("threads") as engine:
        assert not engine.defers
        with pytest.raises(ValueError, match="open engine='io_uring'"):
            engine.prepare([])
        with pytest.raises(ValueError, match="open engine='io_uring'"):
            engine.submit([], when_over=Word().buffer)


# ---------------------------------------------------------------------------------- never, or too late


def test_cancel(engine, file):
    word = Word()
    ticket = engine.prepare(write_of(file, pages(5000), padded=True), when_over=word.buffer)
    call = ticket.release_call()
    assert ticket.cancel()
    assert not ticket.cancel()
    assert word.value == 1
    with pytest.raises(OSError, match="cancelled before it was released") as caught:
        ticket.wait()
    assert caught.value.errno == errno.ECANCELED
    assert engine.bounces.num_in_use == 0
    call_in_c_thread(*call)  # too late: nothing happens
    engine.drain()
    assert os.fstat(file.buffered_fd).st_size == 0


def test_cancel_after_the_release_is_too_late(engine, file):
    data = pages(4096)
    ticket = engine.prepare(write_of(file, data))
    ticket.release()
    assert not ticket.cancel()
    ticket.wait(timeout_s=20)
    assert on_disk(file, 0, 4096) == data


def test_whoever_waits_learns_that_nobody_will_release(engine, file):
    def alive():
        raise RuntimeError("the device is lost")

    ticket = engine.prepare(write_of(file, pages(4096)), alive=alive)
    assert not ticket.done()
    begin = time.monotonic()
    with pytest.raises(OSError, match="never be released: the device is lost"):
        ticket.wait()
    assert time.monotonic() - begin < 2


def test_close_with_batches_that_nobody_released(tmp_path):
    threads, fds = num_threads(), open_fds()
    engine = make_engine(queue_depth=4)
    words = [Word() for _ in range(3)]
    with contextlib.closing(create_unlinked(tmp_path)) as file:
        tickets = [
            engine.prepare(write_of(file, pages(4096), i * 4096), when_over=word.buffer)
            for i, word in enumerate(words)
        ]
        late = tickets[1].release_call()
        begin = time.monotonic()
        engine.close()
        assert time.monotonic() - begin < 5
        assert all(word.value == 1 for word in words)
        for ticket in tickets:
            with pytest.raises(OSError, match="Operation canceled"):
                ticket.wait()
        call_in_c_thread(*late)
        assert os.fstat(file.buffered_fd).st_size == 0
    del engine, tickets, ticket, file
    gc.collect()
    assert soon(lambda: num_threads() <= threads)
    assert soon(lambda: open_fds() == fds)


AFTER_EVERYTHING = """
import ctypes, gc, sys
sys.path.insert(0, sys.argv[1])
from memopt.io import create_unlinked
from tests.io.test_deferred import call_in_c_thread, make_engine, pages, write_of
engine = make_engine()
file = create_unlinked(sys.argv[2])
calls = [engine.prepare(write_of(file, pages(5000), i * 8192, padded=True)).release_call() for i in range(40)]
engine.close()
file.close()
del engine, file
gc.collect()
waste = [bytearray(b"\\xff" * n) for n in range(16, 4096, 16)]  # takes memory that was freed too early
for call in calls:
    call_in_c_thread(*call)
print("ended")
"""


def test_release_after_ticket_and_engine_are_gone(tmp_path):
    make_engine().close()
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    done = subprocess.run(
        [sys.executable, "-c", AFTER_EVERYTHING, root, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
        env={**os.environ, "MALLOC_PERTURB_": "165"},
    )
    assert (done.returncode, done.stdout) == (0, "ended\n"), done.stderr


def test_releases_race_with_close(tmp_path):
    for _ in range(20):
        engine = make_engine(queue_depth=2)
        with contextlib.closing(create_unlinked(tmp_path)) as file:
            data = [pages(64 * KIB) for _ in range(6)]
            tickets = [engine.prepare(write_of(file, d, i * 64 * KIB)) for i, d in enumerate(data)]
            calls = [ticket.release_call() for ticket in tickets]
            thread = threading.Thread(
                target=lambda c=calls: [call_in_c_thread(*call) for call in c]
            )
            thread.start()
            engine.close()
            thread.join()
            for i, ticket in enumerate(tickets):
                if ticket.error is None:
                    ticket.wait()
                    assert on_disk(file, i * 64 * KIB, 64 * KIB) == data[i]
                else:
                    assert ticket.error.errno == errno.ECANCELED


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_between_prepare_and_release(engine, file):
    data = pages(MIB)
    ticket = engine.prepare(write_of(file, data))
    call = ticket.release_call()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        with contextlib.suppress(BaseException):
            engine.close()
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    call_in_c_thread(*call)
    ticket.wait(timeout_s=20)
    assert on_disk(file, 0, MIB) == data


# -------------------------------------------------------------------------------------------------- model

SLOT_BYTES, NUM_SLOTS = 24 * KIB, 6
ACTION = st.tuples(
    st.sampled_from(["prepare", "prepare", "release", "release", "cancel", "write", "read"]),
    st.integers(0, NUM_SLOTS - 1),
    st.integers(1, SLOT_BYTES),
    st.sampled_from([0, 0, 1, 512]),
)


class Model:
    """What the file must hold: a slot is in one state at a time, and prepared batches change it when released."""

    def __init__(self, engine, file) -> None:
        self.engine, self.file = engine, file
        self.slots = [bytearray(SLOT_BYTES) for _ in range(NUM_SLOTS)]
        self.prepared: dict[int, tuple] = {}
        self.moving: dict[int, tuple] = {}
        os.ftruncate(file.buffered_fd, 0)
        os.ftruncate(file.buffered_fd, NUM_SLOTS * SLOT_BYTES)

    def act(self, kind: str, slot: int, nbytes: int, shift: int) -> None:
        if kind in ("release", "cancel"):
            return self.end(kind, slot)
        if slot in self.prepared:
            return None
        self.settle(slot)
        data, word = pages(nbytes, shift=shift), Word()
        job = (read_of if kind == "read" else write_of)(self.file, data, slot * SLOT_BYTES)
        if kind == "prepare":
            ticket = self.engine.prepare(job, when_over=word.buffer)
            self.prepared[slot] = (ticket, data, word)
            return None
        ticket = self.engine.submit(job, when_over=word.buffer)
        self.begin(slot, ticket, data, word, is_read=kind == "read")
        return None

    def begin(self, slot, ticket, data, word, *, is_read) -> None:
        if not is_read:
            self.slots[slot][: len(data)] = data
        self.moving[slot] = (ticket, data, word, bytes(self.slots[slot][: len(data)]))

    def end(self, kind: str, slot: int) -> None:
        if slot not in self.prepared:
            return
        ticket, data, word = self.prepared.pop(slot)
        assert word.value == 0
        if kind == "cancel":
            assert ticket.cancel()
            assert word.value == 1
            return
        data[:] = os.urandom(len(data))
        call_in_c_thread(*ticket.release_call())
        self.begin(slot, ticket, data, word, is_read=False)

    def settle(self, slot: int) -> None:
        if slot in self.moving:
            ticket, data, word, expected = self.moving.pop(slot)
            word.wait()
            assert data == expected
            ticket.wait()

    def check(self) -> None:
        for slot in range(NUM_SLOTS):
            self.settle(slot)
        for slot in list(self.prepared):
            self.end("cancel", slot)
        self.engine.drain()
        assert on_disk(self.file, 0, NUM_SLOTS * SLOT_BYTES + 1) == b"".join(self.slots)
        assert self.engine.stats().num_in_flight == 0
        assert self.engine.bounces.num_in_use == 0


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(actions=st.lists(ACTION, min_size=10, max_size=60))
def test_random_actions_against_model(engine, file, actions):
    model = Model(engine, file)
    for action in actions:
        model.act(*action)
    model.check()


# ------------------------------------------------------------------------------------------------ extents


def test_extent_parts_prepared_released_read_back(tmp_path):
    with make_engine() as engine, ExtentStore([(tmp_path, 8 * MIB)], engine) as store:
        nbytes, part = 3 * MIB + 77, MIB
        extent, data = store.alloc(nbytes), pages(nbytes, fill=bytes(nbytes))
        tickets = [
            store.prepare_write(extent, data[at : at + part], offset=at)
            for at in range(0, nbytes, part)
        ]
        data[:] = os.urandom(nbytes)
        calls = [ticket.release_call() for ticket in tickets]
        releaser = threading.Timer(0.2, lambda: [call_in_c_thread(*c) for c in calls])
        releaser.start()
        back, word = pages(nbytes, fill=bytes(nbytes)), Word()
        ticket = store.read(extent, back, when_over=word.buffer)  # waits for the writes by itself
        assert all(t.done() for t in tickets)
        word.wait()
        assert back == data
        ticket.wait()
        releaser.join()
        store.free(extent)


def test_space_of_a_freed_extent_waits_for_its_prepared_write(tmp_path):
    with make_engine() as engine, ExtentStore([(tmp_path, MIB)], engine) as store:
        first, data = store.alloc(MIB), pages(MIB)
        ticket = store.prepare_write(first, data)
        store.free(first)
        threading.Timer(0.2, ticket.release).start()
        second = store.alloc(MIB)  # the budget holds one: it must wait
        assert ticket.done()
        other = pages(MIB)
        store.write(second, other).wait()
        back = bytearray(MIB)
        store.read(second, back).wait()
        assert back == other


def test_extent_whose_prepared_write_failed_is_not_read(tmp_path):
    with make_engine() as engine, ExtentStore([(tmp_path, MIB)], engine) as store:
        extent = store.alloc(8192)
        ticket = store.prepare_write(extent, pages(8192))
        engine.inject(-errno.EIO, count=1)
        call_in_c_thread(*ticket.release_call())
        with pytest.raises(OSError, match="write at offset"):
            store.read(extent, bytearray(8192))


def test_store_closes_with_prepared_writes(tmp_path):
    with make_engine() as engine:
        store = ExtentStore([(tmp_path, MIB)], engine)
        ticket = store.prepare_write(store.alloc(8192), pages(8192))
        call = ticket.release_call()
        store.close()
        call_in_c_thread(*call)
        with pytest.raises(OSError, match="canceled"):
            ticket.wait()
