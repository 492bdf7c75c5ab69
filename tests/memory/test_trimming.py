"""Idle host memory leaves slab by slab, beside the program: nothing that training needs waits for it."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch

from memopt.memory._packing import unneeded
from memopt.memory._slab import Slab
from memopt.memory.pinned import HostPool
from tests.activations._fake_cuda import FakeDevice, FakeEvent

PAGE = 4096
MIB = 1 << 20


class SlowDevice(FakeDevice):
    """Registers what it is given, and takes its time to undo that."""

    def __init__(self, unregister_s: float = 0.0) -> None:
        super().__init__(pause_s=0.0)
        self.unregister_s = unregister_s
        self.registered: dict[int, int] = {}
        self.unregistered_by: list[str] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def host_register(self, address, nbytes):
        self.registered[address] = nbytes
        return ""

    def host_unregister(self, address):
        self.may_go_on.wait(20)
        time.sleep(self.unregister_s)
        del self.registered[address]
        self.unregistered_by.append(threading.current_thread().name)
        return ""


@pytest.fixture
def device():
    found = SlowDevice()
    yield found
    found.may_go_on.set()
    found.close()
    assert found.registered == {}, "memory was left registered"
    assert not any(t.name.startswith("memopt-") for t in threading.enumerate())


def filled_pool(device, num_slabs=6, slab_bytes=4 * MIB, **options):
    """A pool with that many idle slabs."""
    pool = HostPool(64 * MIB, True, cudart=device, chunk_bytes=slab_bytes, **options)
    pool.reserve({slab_bytes: num_slabs})
    pool.settle()
    assert pool.stats().num_slabs == num_slabs
    return pool


def eventually(condition):
    limit = time.perf_counter() + 20
    while not condition():
        assert time.perf_counter() < limit
        time.sleep(0.002)


def test_what_a_plan_does_not_need_leaves_and_the_rest_stays(device):
    with filled_pool(device) as pool:
        leaving = pool.trim_beside({MIB: 8})  # two slabs, and one to spare
        assert leaving == 3 * 4 * MIB
        eventually(lambda: pool.stats().mapped_bytes == 3 * 4 * MIB)
        stats = pool.stats()
        assert stats.locked_bytes == stats.mapped_bytes == sum(device.registered.values())
        assert (stats.trims.num_slabs, stats.trims.size_bytes) == (3, leaving)
        assert 0 < stats.trims.longest_s <= stats.trims.total_s
        assert set(device.unregistered_by) == {"memopt-trim"}
        buffers = [pool.take(MIB) for _ in range(8)]
        assert pool.stats().num_slabs == 3, "what the plan needs is there"
        for buffer in buffers:
            buffer.release()


def test_buffers_in_use_and_on_their_way_stay(device):
    with filled_pool(device, num_slabs=3) as pool:
        used, cooling = pool.take(4 * MIB), pool.take(4 * MIB)
        used.memoryview[:4] = b"stay"
        event = FakeEvent()
        event.device, mark = device, threading.Event()
        event.mark = mark
        cooling.release(event)
        assert pool.trim_beside({4 * MIB: 2}) == 0, "one is idle, and that one is to spare"
        assert pool.trim_beside({}) == 4 * MIB
        eventually(lambda: pool.stats().mapped_bytes == 8 * MIB)
        assert pool.trim_beside({}) == 0
        mark.set()
        assert pool.trim_beside({}) == 4 * MIB
        eventually(lambda: pool.stats().mapped_bytes == 4 * MIB)
        assert bytes(used.memoryview[:4]) == b"stay"
        used.release()


def test_nothing_waits_while_a_slab_is_being_unregistered(device):
    """The pool goes on serving buffers, and says how it stands, while CUDA takes its time."""
    with filled_pool(device) as pool:
        device.may_go_on.clear()
        pool.trim_beside({MIB: 8})
        eventually(lambda: pool._trimmer.is_busy)
        begin = time.perf_counter()
        for _ in range(200):
            buffers = [pool.take(MIB) for _ in range(8)]
            assert pool.stats().mapped_bytes == 6 * 4 * MIB, "it counts until it is gone"
            for buffer in buffers:
                buffer.release()
        took_s = time.perf_counter() - begin
        assert pool._trimmer.is_busy
        assert pool.stats().trims.num_slabs == 0
        device.may_go_on.set()
        assert took_s < 5
        eventually(lambda: pool.stats().mapped_bytes == 3 * 4 * MIB)


def test_a_kernels_stream_goes_on_beside_it(device):
    """No gap between kernels comes near what unregistering takes: no lock is held meanwhile that they need."""
    device.unregister_s = 0.15
    ends: list[float] = []
    with filled_pool(device, num_slabs=4) as pool:
        pool.trim_beside({})
        while pool.stats().trims.num_slabs < 3:
            buffer = pool.take(MIB)
            device.compute.run(lambda: ends.append(time.perf_counter()))
            buffer.release()
            time.sleep(0.001)
        device.synchronize()
        gaps = sorted(b - a for a, b in itertools.pairwise(ends))
        assert len(gaps) > 100
        assert gaps[-3] < 0.1, f"the longest gaps were {gaps[-3:]}"
        assert pool.stats().trims.longest_s >= 0.15


def test_there_is_a_pause_after_each_slab(device):
    device.unregister_s = 0.02
    begin = time.perf_counter()
    with filled_pool(device, num_slabs=4) as pool:
        pool.trim_beside({})
        eventually(lambda: pool.stats().trims.num_slabs == 3)
        trims = pool.stats().trims
        assert time.perf_counter() - begin > trims.total_s + 2 * 4 * 0.02


def test_a_buffer_that_finds_no_room_calls_slabs_back(device):
    with filled_pool(device) as pool:
        device.may_go_on.clear()
        pool.trim_beside({MIB: 8})
        eventually(lambda: pool._trimmer.is_busy)
        buffers = [pool.take(4 * MIB) for _ in range(5)]
        assert len(device.registered) == 6, "none was mapped or locked anew"
        device.may_go_on.set()
        eventually(lambda: pool.stats().mapped_bytes == 5 * 4 * MIB)
        assert pool.stats().trims.num_slabs == 1
        for buffer in buffers:
            buffer.release()


def test_the_cap_is_kept_by_waiting_for_the_slab_that_leaves(device):
    pool = HostPool(8 * MIB, True, cudart=device, chunk_bytes=4 * MIB)
    with pool:
        pool.reserve({4 * MIB: 2})
        pool.settle()
        first = pool.take(4 * MIB)
        other = pool.take(4 * MIB)
        other.release()
        device.may_go_on.clear()
        pool._chunk_bytes = 0  # nothing to spare
        assert pool.trim_beside({}) == 4 * MIB
        eventually(lambda: pool._trimmer.is_busy)
        assert pool.try_take(4 * MIB, wait=False) is None
        threading.Timer(0.05, device.may_go_on.set).start()
        second = pool.take(4 * MIB)
        assert pool.stats().peak_mapped_bytes == 8 * MIB
        first.release()
        second.release()


def test_closing_in_the_middle_leaves_nothing(device):
    device.unregister_s = 0.05
    pool = filled_pool(device)
    pool.trim_beside({})
    eventually(lambda: pool._trimmer.is_busy)
    pool.close()
    assert device.registered == {}
    with pytest.raises(ValueError, match="closed"):
        pool.trim_beside({})


def test_a_tensor_that_is_still_held_keeps_its_bytes(device):
    with filled_pool(device, num_slabs=2) as pool:
        buffers = [pool.take(4 * MIB), pool.take(4 * MIB)]
        held = [b.tensor(torch.uint8, (4 * MIB,)).fill_(9) for b in buffers]
        for buffer in buffers:
            buffer.release()
        pool.trim_beside({})
        eventually(lambda: pool.stats().trims.num_slabs == 1)
        assert all(bool((t == 9).all()) for t in held)


def test_a_new_plan_counts_with_what_has_not_left(device):
    with filled_pool(device) as pool:
        device.may_go_on.clear()
        pool.trim_beside({})
        eventually(lambda: pool._trimmer.is_busy)
        assert pool.reserve({4 * MIB: 5}) == 0
        assert len(device.registered) == 6
        device.may_go_on.set()
        pool.settle()


def test_packing_leaves_a_share_to_spare():
    slabs = [Slab(4 * MIB, base=PAGE + i * 8 * MIB, huge_pages=False) for i in range(40)]
    assert unneeded([], slabs, [], 0) == slabs
    assert unneeded([], slabs, [MIB] * 64, MIB) == slabs[17:]
    assert unneeded(slabs[:1], slabs[1:], [MIB] * 64, MIB) == slabs[17:]
    assert unneeded([], slabs, [MIB] * 128, MIB) == slabs[34:]
    assert unneeded([], slabs[:4], [3 * MIB] * 4, MIB) == []
    assert unneeded(slabs[:2], slabs[2:4], [MIB], MIB) == slabs[2:4], (
        "what is busy stays, and is enough"
    )
    assert unneeded([], slabs[:4], [5 * MIB], MIB) == slabs[1:4], "what fits nowhere keeps nothing"
