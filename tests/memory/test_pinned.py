from __future__ import annotations

import ctypes
import errno
import gc
import itertools
import mmap
import os
import random
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.memory import _builder, _slab
from memopt.memory._cudart import LoadedCudart
from memopt.memory.pinned import HostPool, HostPoolFull

PAGE = 4096
MIB = 1 << 20
LIBC = ctypes.CDLL(None, use_errno=True)


def resident_pages(address: int, nbytes: int) -> int:
    flags = (ctypes.c_ubyte * (nbytes // PAGE))()
    LIBC.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    if LIBC.mincore(address, nbytes, flags) != 0:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(flag & 1 for flag in flags)


class FakeCudart:
    """Keeps the rules of the real one: no double registration, memory mapped and touched, unregister once."""

    def __init__(
        self, *, refuse_after: int = 1 << 30, error: str = "cudaErrorMemoryAllocation"
    ) -> None:
        self.live: dict[int, int] = {}
        self.calls: list[tuple[object, ...]] = []
        self.threads: set[int] = set()
        self._refuse_after, self._error = refuse_after, error
        self._lock = threading.Lock()

    def host_register(self, address, nbytes):
        with self._lock:
            self.threads.add(threading.get_ident())
            self.calls.append(("register", address, nbytes))
            if self.count("register") > self._refuse_after:
                return self._error
            assert resident_pages(address, nbytes) == nbytes // PAGE, (
                "registered before every page was touched"
            )
            assert all(address + nbytes <= a or a + n <= address for a, n in self.live.items())
            self.live[address] = nbytes
            return ""

    def host_unregister(self, address):
        with self._lock:
            resident_pages(address, self.live.pop(address))  # ENOMEM if it was unmapped before
            self.calls.append(("unregister", address))
            return ""

    def synchronize(self):
        self.calls.append(("synchronize",))
        return ""

    def count(self, name: str) -> int:
        return sum(call[0] == name for call in self.calls)


class FakeEvent:
    def __init__(self) -> None:
        self.passed = threading.Event()
        self.num_waits = 0

    def query(self):
        return self.passed.is_set()

    def synchronize(self):
        self.num_waits += 1
        self.passed.wait(20)


@pytest.fixture
def cudart():
    fake = FakeCudart()
    yield fake
    gc.collect()
    assert fake.live == {}, "memory was left registered"


def locked_pool(cudart, cap_bytes=64 * MIB, **options):
    return HostPool(cap_bytes, True, cudart=cudart, **options)


def num_pin_threads() -> int:
    return sum(thread.name.startswith("memopt-pin") for thread in threading.enumerate())


# ------------------------------------------------------------------------------------------------ buffers


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 4097, 1_000_003])
def test_buffers_are_aligned_writable_and_of_the_size_asked(cudart, nbytes):
    with locked_pool(cudart) as pool:
        buffer = pool.take(nbytes)
        assert (buffer.nbytes, len(buffer.memoryview), buffer.address % PAGE) == (nbytes, nbytes, 0)
        assert buffer.is_locked
        assert not buffer.memoryview.readonly
        tensor = buffer.tensor(torch.uint8, (nbytes,))
        tensor.fill_(7)
        assert bytes(buffer.memoryview) == b"\7" * nbytes
        if nbytes:
            assert tensor.data_ptr() == buffer.address
            assert (
                tensor.untyped_storage().nbytes() == nbytes
            )  # torch.save of it is not the whole slab
        buffer.release()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_tensors_of_every_type(dtype):
    with HostPool(MIB, False) as pool:
        buffer = pool.take(6 * dtype.itemsize)
        tensor = buffer.tensor(dtype, (2, 3))
        assert (tensor.dtype, tuple(tensor.shape), tensor.is_contiguous()) == (dtype, (2, 3), True)
        assert tuple(buffer.tensor(dtype, (0, 3)).shape) == (0, 3)
        with pytest.raises(
            ValueError,
            match=f"needs {7 * dtype.itemsize} bytes, the buffer has {6 * dtype.itemsize}",
        ):
            buffer.tensor(dtype, (7,))


def test_neighbours_do_not_overlap(cudart):
    with locked_pool(cudart) as pool:
        buffers = [pool.take(size) for size in (1, 5000, 4096, 3, 100_000)]
        for i, buffer in enumerate(buffers):
            buffer.memoryview[:] = bytes([i]) * buffer.nbytes
        assert all(bytes(b.memoryview) == bytes([i]) * b.nbytes for i, b in enumerate(buffers))


def test_misuse_is_refused(cudart):
    with pytest.raises(ValueError, match="cap_bytes=100"):
        HostPool(100, False)
    pool = locked_pool(cudart)
    with pytest.raises(ValueError, match="nbytes=-1"):
        pool.take(-1)
    buffer = pool.take(10)
    buffer.release()
    with pytest.raises(ValueError, match="released before"):
        buffer.release()
    pool.close()
    for call in (lambda: pool.take(1), lambda: pool.reserve({1: 1})):
        with pytest.raises(ValueError, match="closed"):
            call()


# ---------------------------------------------------------------------------------- sizes, waste, reuse


def test_reserved_sizes_are_mapped_exactly(cudart):
    sizes = {3 * MIB + 123: 5, 700_001: 9, 100: 1}
    total = sum(-(-n // PAGE) * PAGE * count for n, count in sizes.items())
    with locked_pool(cudart, chunk_bytes=8 * MIB) as pool:
        assert pool.reserve(sizes) == 0
        pool.settle()
        assert (
            pool.stats().mapped_bytes
            == pool.stats().locked_bytes
            == total
            == sum(cudart.live.values())
        )
        assert max(cudart.live.values()) <= 8 * MIB
        buffers = [
            pool.take(n) for n, count in sorted(sizes.items(), reverse=True) for _ in range(count)
        ]
        stats = pool.stats()
        assert (stats.mapped_bytes, stats.in_use_bytes, stats.num_buffers) == (total, total, 15)
        assert stats.asked_bytes == sum(n * count for n, count in sizes.items())
        assert (
            stats.waste_bytes <= 0.01 * stats.peak_mapped_bytes
        )  # power-of-two blocks would waste 34 %
        assert stats.populate_s > 0
        assert stats.lock_s > 0
        assert len(buffers) == 15


def test_a_buffer_larger_than_a_chunk_is_one_registration(cudart):
    with locked_pool(cudart, chunk_bytes=MIB) as pool:
        assert pool.reserve({3 * MIB: 2, 1000: 3}) == 0
        pool.settle()
        assert sorted(cudart.live.values()) == [3 * PAGE, 3 * MIB, 3 * MIB]


def test_steps_reuse_the_same_memory(cudart):
    sizes = [random.Random(0).randrange(1, MIB) for _ in range(40)]
    with locked_pool(cudart) as pool:
        for step in range(20):
            buffers = [pool.take(n) for n in sizes]
            for buffer in random.Random(step).sample(buffers, len(buffers)):
                buffer.release()
            if step == 0:
                first = (cudart.count("register"), pool.stats().mapped_bytes)
        assert (cudart.count("register"), pool.stats().mapped_bytes) == first
        assert cudart.count("unregister") == 0


def test_other_shapes_reuse_locked_memory(cudart):
    """A new sequence length brings new sizes: their bytes come out of what is locked already."""
    with locked_pool(cudart, 8 * MIB) as pool:
        pool.reserve({2 * MIB: 4})
        pool.settle()
        for size, count in [(MIB, 8), (3 * MIB, 2), (8 * MIB, 1), (100_000, 80)]:
            buffers = [pool.take(size) for _ in range(count)]
            assert pool.stats().mapped_bytes == 8 * MIB
            for buffer in buffers:
                buffer.release()
        assert cudart.count("register") == 1


def test_reserving_again_maps_only_what_is_missing(cudart):
    with locked_pool(cudart) as pool:
        pool.reserve({MIB: 4})
        pool.reserve({MIB: 4})
        pool.settle()
        assert pool.stats().mapped_bytes == 4 * MIB
        pool.reserve({MIB: 6})
        pool.settle()
        assert pool.stats().mapped_bytes == 6 * MIB


# -------------------------------------------------------------------------------------------------- cap


def test_the_cap_is_hard_and_named(cudart):
    with locked_pool(cudart, 4 * MIB) as pool:
        assert pool.reserve({MIB: 6}) == 2 * MIB
        pool.settle()
        buffers = [pool.take(MIB) for _ in range(4)]
        assert pool.try_take(1) is None
        with pytest.raises(
            HostPoolFull, match=f"1 bytes asked of a host pool of {4 * MIB}, of which {4 * MIB}"
        ):
            pool.take(1)
        with pytest.raises(HostPoolFull):
            pool.take(1 << 40)
        buffers[0].release()
        assert pool.take(1).nbytes == 1
        assert pool.stats().peak_mapped_bytes == 4 * MIB


def test_idle_memory_of_other_sizes_makes_room(cudart):
    with locked_pool(cudart, 4 * MIB, growth_bytes=PAGE) as pool:
        small = [pool.take(MIB) for _ in range(4)]
        for buffer in small[:3]:
            buffer.release()
        pool.take(3 * MIB)
        assert pool.stats().mapped_bytes == 4 * MIB
        names = [call[0] for call in cudart.calls]
        assert names == ["register"] * 4 + ["unregister"] * 3 + ["register"]
        assert bytes(small[3].memoryview) == bytes(MIB)


def test_many_threads_stay_under_the_cap(cudart):
    cap, failures = 6 * MIB, []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(60):
                buffer = pool.try_take(rng.randrange(1, MIB))
                assert pool.stats().mapped_bytes <= cap
                if buffer is not None:
                    mark = bytes([seed]) * buffer.nbytes
                    buffer.memoryview[:] = mark
                    time.sleep(0.0005)
                    assert bytes(buffer.memoryview) == mark
                    buffer.release()
        except BaseException as error:
            failures.append(error)
            raise

    with locked_pool(cudart, cap, growth_bytes=MIB) as pool:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert pool.stats().in_use_bytes == 0
        assert sum(cudart.live.values()) == pool.stats().mapped_bytes


# ----------------------------------------------------------------------------------------------- events


def test_a_buffer_is_not_handed_out_before_its_event(cudart):
    with locked_pool(cudart, 2 * MIB, growth_bytes=PAGE) as pool:
        first = pool.take(MIB)
        address, event = first.address, FakeEvent()
        first.release(event)
        second = pool.take(MIB)  # there is room for another one: no reason to wait
        assert second.address != address
        assert event.num_waits == 0
        timer = threading.Timer(0.2, event.passed.set)
        timer.start()
        start = time.monotonic()
        third = pool.take(MIB)
        assert time.monotonic() - start > 0.15
        assert third.address == address
        assert event.num_waits == 1
        timer.join()


def test_a_passed_event_does_not_wait(cudart):
    with locked_pool(cudart) as pool:
        buffer, event = pool.take(MIB), FakeEvent()
        event.passed.set()
        buffer.release(event)
        pool.take(MIB)
        assert event.num_waits == 0


def test_waiting_for_an_event_lets_other_threads_in(cudart):
    with locked_pool(cudart, 2 * MIB, growth_bytes=PAGE) as pool:
        kept, event = pool.take(MIB), FakeEvent()
        pool.take(MIB).release(event)
        waiter = threading.Thread(target=lambda: pool.take(MIB))
        waiter.start()
        time.sleep(0.1)
        kept.release()  # would hang if the waiter held the pool
        assert pool.stats().num_buffers == 0
        event.passed.set()
        waiter.join(20)
        assert pool.stats().num_buffers == 1


def test_close_waits_for_events_before_unlocking(cudart):
    pool = locked_pool(cudart)
    event = FakeEvent()
    pool.take(MIB).release(event)
    threading.Timer(0.1, lambda: (cudart.calls.append(("event",)), event.passed.set())).start()
    pool.close()
    names = [call[0] for call in cudart.calls]
    assert names == ["register", "event", "synchronize", "unregister"]


# ---------------------------------------------------------------------------- populating, locking, life


@pytest.mark.parametrize("huge_pages", [False, True])
@pytest.mark.parametrize("old_kernel", [False, True])
def test_every_page_is_touched_whatever_the_kernel_knows(monkeypatch, old_kernel, huge_pages):
    if old_kernel:

        def unknown(*_args):
            ctypes.set_errno(errno.EINVAL)
            return -1

        monkeypatch.setattr(_slab, "_libc", type("Libc", (), {"madvise": staticmethod(unknown)}))
    slab = _slab.Slab(5 * MIB, PAGE, huge_pages=huge_pages)
    if not huge_pages:
        assert resident_pages(slab.address, slab.nbytes) == 0
    slab.populate(0, 3 * MIB)
    slab.populate(3 * MIB, 5 * MIB)
    assert resident_pages(slab.address, slab.nbytes) == slab.nbytes // PAGE


def test_faulting_in_never_keeps_the_memory_map_for_long(monkeypatch):
    """One call of 64 MiB kept every mmap of the process waiting, up to a second on a fresh virtual machine."""
    slab = _slab.Slab(21 * MIB, 0, huge_pages=True)
    calls, real = [], _slab._libc.madvise

    def madvise(address, nbytes, advice):
        calls.append((address - slab.address, nbytes))
        return real(address, nbytes, advice)

    monkeypatch.setattr(_slab, "_libc", type("Libc", (), {"madvise": staticmethod(madvise)}))
    slab.populate(MIB, slab.nbytes)
    assert max(nbytes for _, nbytes in calls) <= 4 * MIB
    ends = [offset + nbytes for offset, nbytes in calls]
    assert [offset for offset, _ in calls] == [MIB, *ends[:-1]]
    assert ends[-1] == slab.nbytes


def test_pages_that_are_dropped_really_leave():
    """Of shared memory, which is what Python maps by default, they would only be hidden, and take no huge pages."""
    slab = _slab.Slab(4 * MIB, 0, huge_pages=True)
    slab.populate(0, slab.nbytes)
    slab.memory[:] = b"x" * slab.nbytes
    slab.discard()
    assert resident_pages(slab.address, slab.nbytes) == 0
    assert slab.memory[:] == bytes(slab.nbytes)


def test_four_threads_work_on_one_slab(monkeypatch, cudart):
    monkeypatch.setattr(_builder, "_PIECE_BYTES", MIB)
    together = threading.Barrier(4, timeout=20)
    real = _slab.Slab.populate

    def populate(self, begin, end):
        together.wait()  # breaks unless four threads are here at once
        real(self, begin, end)

    monkeypatch.setattr(_slab.Slab, "populate", populate)
    with locked_pool(cudart) as pool:
        pool.take(8 * MIB)
    assert num_pin_threads() == 0


def test_locking_runs_beside_the_caller(monkeypatch, cudart):
    gate = threading.Event()
    real = _slab.Slab.populate

    def populate(self, begin, end):
        assert gate.wait(20)
        real(self, begin, end)

    monkeypatch.setattr(_slab.Slab, "populate", populate)
    with locked_pool(cudart) as pool:
        pool.reserve({MIB: 8})  # returns although nothing can be locked yet
        assert pool.stats().locked_bytes == 0
        taken = []
        taker = threading.Thread(target=lambda: taken.append(pool.take(MIB)))
        taker.start()
        time.sleep(0.05)
        assert taken == []
        gate.set()
        taker.join(20)
        assert taken[0].is_locked
        pool.settle()
        assert pool.stats().mapped_bytes == 8 * MIB


def test_who_does_not_wait_gets_none_until_the_memory_is_locked(monkeypatch, cudart):
    gate = threading.Event()
    real = _slab.Slab.populate

    def populate(self, begin, end):
        assert gate.wait(20)
        real(self, begin, end)

    monkeypatch.setattr(_slab.Slab, "populate", populate)
    with locked_pool(cudart) as pool:
        assert pool.try_take(MIB, wait=False) is None  # not reserved: locking begins now
        assert pool.is_locking
        pool.reserve({MIB: 8})
        assert pool.try_take(MIB, wait=False) is None
        gate.set()
        pool.settle()
        assert not pool.is_locking
        buffer = pool.try_take(MIB, wait=False)
        assert buffer is not None
        assert buffer.is_locked


def test_refused_locking_falls_back_and_says_why(caplog):
    cudart = FakeCudart(refuse_after=2)
    with locked_pool(cudart, chunk_bytes=MIB, num_threads=1) as pool:
        pool.reserve({MIB: 6})
        pool.settle()
        stats = pool.stats()
        assert (stats.locked_bytes, stats.mapped_bytes) == (2 * MIB, 6 * MIB)
        assert (
            stats.unlocked_reason == f"page-locking {MIB} bytes failed: cudaErrorMemoryAllocation"
        )
        assert cudart.count("register") == 3  # it does not ask again and again
        assert "host memory stays pageable" in caplog.text
        buffers = [pool.take(MIB) for _ in range(6)]
        assert sorted(buffer.is_locked for buffer in buffers) == [False] * 4 + [True] * 2
    assert cudart.live == {}
    assert cudart.count("unregister") == 2


def test_a_runtime_that_raises_does_not_hang_the_pool(cudart, monkeypatch):
    def broken(*_args):
        raise OSError("library call failed")

    with locked_pool(cudart) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(cudart, "host_register", broken)
            with pytest.raises(OSError, match="library call failed"):
                pool.take(MIB)
        assert pool.stats().mapped_bytes == 0
        assert pool.take(MIB).is_locked


class FakeLibrary:
    """What ctypes shows of libcudart."""

    def __init__(self, code: int, device: int) -> None:
        self.log: list[str] = []
        for name in ("Register", "Unregister"):
            self._add(f"cudaHost{name}", lambda *_, n=name: self._note(n, code))
        self._add("cudaDeviceSynchronize", lambda: self._note("Synchronize", code))
        self._add("cudaSetDevice", lambda index: self._note(f"SetDevice {index}", 0))
        self._add("cudaGetDevice", lambda pointer: self._answer(pointer, device))
        self._add("cudaGetErrorName", lambda number: f"cudaError{number}".encode())
        self._add("cudaGetLastError", lambda: self._note("GetLastError", code))

    def _add(self, name, function):
        setattr(self, name, type("Function", (), {"__call__": lambda _self, *a: function(*a)})())

    def _note(self, text, code):
        self.log.append(text)
        return code

    def _answer(self, pointer, device):
        pointer._obj.value = device
        return 0


def test_the_runtime_clears_its_error_and_keeps_the_threads_device():
    library = FakeLibrary(code=2, device=0)
    assert LoadedCudart(library, 3).host_register(4096, 4096) == "cudaError2"
    assert library.log == ["SetDevice 3", "Register", "SetDevice 0", "GetLastError"]
    library = FakeLibrary(code=0, device=3)
    assert LoadedCudart(library, 3).host_unregister(4096) == ""
    assert library.log == ["SetDevice 3", "Unregister"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_cuda_the_buffers_are_plain_and_the_reason_is_told():
    with HostPool(MIB, True) as pool:
        assert not pool.take(100).is_locked
        assert pool.stats().unlocked_reason == "CUDA is not available"
    with HostPool(MIB, False) as pool:
        assert pool.stats().unlocked_reason == "page-locking was not asked for"


def test_close_unlocks_before_it_frees_and_leaves_no_thread(cudart):
    pool = locked_pool(cudart, growth_bytes=PAGE)
    held = pool.take(MIB)
    tensor = held.tensor(torch.uint8, (MIB,)).fill_(3)
    pool.take(2 * MIB).release()
    pool.close()
    pool.close()
    assert [call[0] for call in cudart.calls] == [
        "register",
        "register",
        "synchronize",
        "unregister",
        "unregister",
    ]
    assert not held.is_locked
    assert num_pin_threads() == 0
    held.release()
    del held, pool
    gc.collect()
    assert int(tensor.sum()) == 3 * MIB  # the tensor keeps its memory


def test_memory_really_goes_back(cudart):
    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * PAGE

    before = mapped()
    pool = locked_pool(cudart)
    pool.take(48 * MIB).release()
    assert mapped() - before >= 48 * MIB
    pool.close()
    del pool
    gc.collect()
    assert mapped() - before < 16 * MIB


def test_a_dropped_pool_unlocks(cudart):
    pool = locked_pool(cudart)
    pool.take(MIB)
    del pool
    gc.collect()
    assert cudart.live == {}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_children_do_not_inherit_the_memory(cudart):
    with locked_pool(cudart) as pool:
        buffer = pool.take(2 * MIB)
        maps, flags = Path("/proc/self/smaps").read_text().splitlines(), ""
        inside = False
        for line in maps:
            if "-" in line.split(maxsplit=1)[0] and ":" not in line.split(maxsplit=1)[0]:
                begin, end = (int(x, 16) for x in line.split(maxsplit=1)[0].split("-"))
                inside = begin <= buffer.address < end
            if inside and line.startswith("VmFlags"):
                flags = line
        assert " dc" in flags  # "do not copy on fork"
        child = os.fork()
        if child == 0:
            num = cudart.count("unregister")
            pool._finalizer()
            os._exit(0 if cudart.count("unregister") == num else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ------------------------------------------------------------------------------------------------ model


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("tttrre"), st.integers(1, 60_000), st.integers(0, 99)),
        max_size=60,
    ),
    st.integers(20, 60),
)
def test_random_use_against_model(steps, cap_pages):
    cudart = FakeCudart()
    pool = locked_pool(cudart, cap_pages * PAGE, growth_bytes=4 * PAGE, num_threads=1)
    live, events = [], []
    for what, nbytes, pick in steps:
        if what == "t":
            for event in events:
                event.passed.set()
            buffer = pool.try_take(nbytes)
            used = sum(-(-b.nbytes // PAGE) for b in live)
            if buffer is None:
                assert used > 0 or -(-nbytes // PAGE) > cap_pages
                continue
            buffer.memoryview[:] = bytes([len(live) % 251]) * nbytes
            live.append(buffer)
            spans = sorted((b.address, b.address + b.nbytes) for b in live)
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        elif live:
            event = FakeEvent() if what == "e" else None
            events += [event] if event else []
            live.pop(pick % len(live)).release(event)
        stats = pool.stats()
        assert stats.mapped_bytes <= cap_pages * PAGE
        assert stats.in_use_bytes == sum(-(-b.nbytes // PAGE) * PAGE for b in live)
        assert stats.locked_bytes == stats.mapped_bytes == sum(cudart.live.values())
    for event in events:
        event.passed.set()
    pool.close()
    assert cudart.live == {}


def test_page_size_is_the_machines():
    assert _slab.PAGE_BYTES == mmap.PAGESIZE


class SlowCudart(FakeCudart):
    """Registering takes 50 ms; notes when each call began and ended."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[tuple[float, float]] = []

    def host_register(self, address, nbytes):
        begin = time.perf_counter()
        time.sleep(0.05)
        self.spans.append((begin, time.perf_counter()))
        return super().host_register(address, nbytes)


def test_locking_leaves_the_program_time_while_nobody_waits():
    cudart = SlowCudart()
    with HostPool(8 * MIB, register=True, chunk_bytes=MIB, cudart=cudart) as pool:
        pool.reserve({MIB: 6})
        while pool.is_locking:
            time.sleep(0.01)  # the program's own work
        spans = sorted(cudart.spans)
    assert len(spans) == 6
    for (begin, end), (after, _) in itertools.pairwise(spans):
        assert after - end >= 0.8 * (end - begin), "a pause as long as the call"


@pytest.mark.parametrize("how", ["settle", "take"])
def test_locking_is_as_fast_as_it_can_be_for_who_waits(how):
    cudart = SlowCudart()
    with HostPool(20 * MIB, register=True, chunk_bytes=MIB, cudart=cudart) as pool:
        pool.reserve({MIB: 20})
        begin = time.perf_counter()
        if how == "settle":
            assert pool.settle()
        else:
            for _ in range(20):
                pool.take(MIB)
        seconds = time.perf_counter() - begin
    assert cudart.count("register") == 20
    assert seconds < 1.2, "20 calls of 50 ms without pauses, and most of them beside others"


def test_who_waits_for_a_moment_only_is_told_that_it_was_not_enough():
    cudart = SlowCudart()
    with HostPool(8 * MIB, register=True, chunk_bytes=MIB, cudart=cudart) as pool:
        pool.reserve({MIB: 8})
        assert not pool.settle(0.01)
        assert pool.settle(10.0)
