"""The chain device -> staging -> SSD and back, on a fake device whose streams are late (see _fake_cuda)."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import random
import threading
import time

import pytest
import torch
from _bitwise import spill_directory
from _fake_cuda import FakeDevice, LostDeviceError, fake_cuda, in_backward

import memopt
from memopt.activations.chain import Chain
from memopt.activations.cuda import CudaTransfers
from memopt.activations.spill import SpillArea
from memopt.activations.stored import Checked, Label
from memopt.io import ExtentStore
from memopt.io.uring import UringEngine
from memopt.memory.pinned import HostPool
from memopt.memory.streams import Words
from memopt.types.errors import IoEngineUnavailable

MIB = 1 << 20
LABEL = Label(region="block", what="output")


class Rig:
    """Transfers of a fake device with a chain of small pieces and little staging."""

    def __init__(self, device: FakeDevice, path, *, staging=1 * MIB, piece=256 * 1024, words=64):
        try:
            self.engine = UringEngine.open(queue_depth=8)
        except IoEngineUnavailable as error:
            if os.environ.get("MEMOPT_REQUIRE_NATIVE", "") not in ("", "0") and "missing" in str(
                error
            ):
                raise
            pytest.skip(str(error))
        self.device = device
        store = ExtentStore([(path, 64 * MIB)], self.engine)
        pool = HostPool(staging, True, growth_bytes=min(staging, MIB), cudart=device)
        self.area = SpillArea(store, pool)
        self.transfers = CudaTransfers(
            torch.device("cpu"), HostPool(MIB, True, cudart=device), None, 1 << 30
        )
        self.transfers.spill = self.area
        self.words = Words(HostPool(MIB, True, cudart=device), device, num_words=words)
        self.chain = Chain(torch.device("cpu"), store, device, self.words, staging)
        self.chain.piece_bytes = piece
        self.transfers.chain = self.chain

    def store(self, tensor, *, overwrite=True):
        """Store, with a kernel before that makes the value and one after that overwrites it once it may."""
        value, source = tensor, torch.zeros_like(tensor)
        self.device.allocated.append(source)
        self.device.compute.run(lambda: move(source, value))
        stored = self.transfers.store(source, "ssd", LABEL, clone_first=False, wait=True)
        if stored is not None and overwrite:
            stored.protect()  # the program writes next: compute must wait for the copies out
            self.device.compute.run(lambda: source.view(torch.uint8).fill_(0xEE))
        return stored

    def take(self, stored):
        """Take and let a kernel read the result."""
        tensor = stored.take(keep=True)
        seen = torch.empty_like(tensor)
        self.device.compute.run(lambda: move(seen, tensor))
        done = self.device.compute.record_event()
        return seen, done

    def same(self, seen, expected) -> None:
        result, done = seen
        done.synchronize()
        assert torch.equal(result, expected)

    def close(self) -> None:
        self.transfers.close()
        self.transfers.close()  # a session closes its engine's transfers, then its resources'
        self.engine.close()


def move(destination: torch.Tensor, source: torch.Tensor) -> None:
    ctypes.memmove(destination.data_ptr(), source.data_ptr(), source.nbytes)


@pytest.fixture
def device(monkeypatch):
    with fake_cuda(monkeypatch, FakeDevice()) as device:
        yield device


@pytest.fixture
def rig(device):
    with spill_directory() as path:
        rig = Rig(device, path)
        yield rig
        if not rig.engine._closed:
            rig.close()


def values(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


SIZES = [65_536, 65_537, 262_144, 262_145, 700_001, 3 * MIB + 77]


@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("ahead", [True, False])
def test_round_trip(rig, nbytes, ahead):
    """With staging of 1 MiB, so the last size goes through the ring three times."""
    value = values(nbytes)
    stored = rig.store(value)
    rig.device.synchronize()
    rig.area.finish()
    if ahead:
        stored.prefetch()
        rig.transfers.poll()
    for _ in range(2):  # another backward may ask again
        rig.same(rig.take(stored), value)
    moved = rig.transfers.moved
    assert (moved.d2h_bytes, moved.ssd_write_bytes) == (nbytes, nbytes)
    assert (moved.h2d_bytes, moved.ssd_read_bytes) == (2 * nbytes, 2 * nbytes)
    assert rig.area.staging.stats().peak_mapped_bytes <= MIB
    assert rig.device.num_calls["wait"] > 0


@pytest.mark.parametrize("nbytes", [65_537, 700_001, MIB])
@pytest.mark.parametrize("overwrite", [True, False])
def test_what_is_still_in_staging_comes_from_there(rig, nbytes, overwrite):
    """Backward begins where forward ended: the disk has not answered yet, and need not."""
    value = values(nbytes)
    rig.engine.inject(-errno.EAGAIN, count=2**31)
    stored = rig.store(value, overwrite=overwrite)
    begin = time.monotonic()
    rig.same(rig.take(stored), value)
    assert time.monotonic() - begin < 5, "it waited for the disk"
    assert rig.transfers.moved.ssd_read_bytes == 0
    rig.take(stored)  # under way while the write ends and gives its buffers back
    rig.engine.inject()
    rig.area.finish()
    for other in range(3):
        rig.same(rig.take(rig.store(values(MIB, seed=other))), values(MIB, seed=other))
    rig.same(rig.take(stored), value)
    assert rig.transfers.moved.ssd_read_bytes >= nbytes


@pytest.mark.parametrize("seed", range(6))
def test_many_tensors_random_order(device, seed):
    """Stored, fetched ahead, dropped and taken in any order, with memory for a few of them in staging."""
    generator = random.Random(seed)
    with spill_directory() as path:
        rig = Rig(device, path, staging=512 * 1024, piece=128 * 1024, words=4)
        live, seen = [], []
        for step in range(60):
            action = generator.choice(["store", "store", "prefetch", "take", "drop", "poll"])
            if action == "store":
                value = values(generator.randint(65_536, 400_000), seed=1000 * seed + step)
                live.append((rig.store(value), value))
            elif action == "poll":
                rig.transfers.poll()
            elif live and action == "prefetch":
                generator.choice(live)[0].prefetch()
            elif live and action == "take":
                stored, value = generator.choice(live)
                seen.append((rig.take(stored), value))
            elif live:
                live.pop(generator.randrange(len(live)))
        for result, value in seen:
            rig.same(result, value)
        for stored, value in live:
            rig.same(rig.take(stored), value)
        assert rig.area.staging.stats().peak_mapped_bytes <= 512 * 1024
        live.clear()
        stored = None
        gc.collect()
        assert rig.area.store.stats().num_extents == 0
        rig.close()
        assert rig.area.staging.stats().num_buffers == 0


def test_the_host_does_not_wait(rig):
    """Store and prefetch return while the device has not begun and the disk does not answer."""
    value = values(300_000)
    gate = threading.Event()
    rig.device.compute.run(gate.wait)
    begin = time.monotonic()
    stored = rig.store(value)
    assert time.monotonic() - begin < 1
    assert not any(write.ticket.done() for write, _ in stored._pieces)
    gate.set()
    rig.device.synchronize()
    rig.area.finish()
    rig.engine.inject(-errno.EAGAIN, count=2**31)
    seen = []

    def body():
        begin = time.monotonic()
        assert stored.prefetch() == value.nbytes
        seen.append(rig.take(stored))
        assert time.monotonic() - begin < 1
        time.sleep(0.1)
        assert not seen[0][1].query(), "the device must wait for the disk"
        rig.engine.inject()

    in_backward("cpu", body)
    rig.same(seen[0], value)


def test_reads_ahead_are_bounded_and_go_on(rig):
    """More is asked ahead than staging holds: the rest follows, in order, without anybody blocking."""
    pairs = [(rig.store(values(500_000, seed=i)), values(500_000, seed=i)) for i in range(8)]
    rig.device.synchronize()
    rig.area.finish()
    rig.engine.inject(-errno.EAGAIN, count=2**31)
    begin = time.monotonic()
    for stored, _ in pairs:
        stored.prefetch()
    assert time.monotonic() - begin < 1
    assert 0 < rig.transfers.moved.ssd_read_bytes <= MIB
    rig.engine.inject()
    for stored, value in pairs:
        rig.same(rig.take(stored), value)
    assert rig.transfers.moved.ssd_read_bytes == 8 * 500_000


def test_without_stream_waits_and_without_words(device):
    """A driver that refuses a wait, and more reads than words: the host waits instead, and nothing is lost."""
    with spill_directory() as path:
        rig = Rig(device, path, words=1)
        pairs = [(rig.store(values(300_000, seed=i)), values(300_000, seed=i)) for i in range(4)]
        for stored, value in pairs:
            stored.prefetch()
            rig.same(rig.take(stored), value)
        device.refuse_waits = True
        for stored, value in pairs:
            rig.same(rig.take(stored), value)
        rig.close()


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_failed_write_surfaces_at_the_next_poll(rig, code):
    rig.engine.inject(-code, count=1)
    stored = rig.store(values(100_000))
    rig.device.synchronize()
    deadline = time.monotonic() + 10
    with pytest.raises(OSError, match="write at offset") as caught:
        while time.monotonic() < deadline:
            rig.transfers.poll()
    assert caught.value.errno == code
    with pytest.raises(OSError, match="write at offset"):
        stored.take(keep=True)
    del stored, caught
    rig.close()


def test_a_failed_read_surfaces_before_backward_returns(rig):
    """The disk answers only after take returned: nobody else would ask before the optimizer's step."""
    stored = rig.store(values(100_000))
    rig.device.synchronize()
    rig.area.finish()
    taken = []

    def body():
        rig.engine.inject(-errno.EAGAIN, count=2**31)
        taken.append(rig.take(stored))
        rig.engine.inject(-errno.EIO, count=1)

    with pytest.raises(OSError, match="read at offset") as caught:
        in_backward("cpu", body)
    assert taken
    assert caught.value.errno == errno.EIO
    rig.transfers.poll()  # raised once
    rig.device.synchronize()  # the stream that waited for the word went on
    in_backward("cpu", lambda: taken.append(rig.take(stored)))
    rig.same(taken[1], values(100_000))


def test_a_failed_read_surfaces_at_take_outside_of_backward(rig):
    stored = rig.store(values(100_000))
    rig.device.synchronize()
    rig.area.finish()
    rig.engine.inject(-errno.EIO, count=1)
    stored.prefetch()
    with pytest.raises(OSError, match="read at offset"):
        stored.take(keep=True)
    rig.same(rig.take(stored), values(100_000))


def test_strict_names_the_disk_not_the_bytes(rig):
    """With strict=True bytes are compared at once: a read that failed must not read as corruption."""
    value = values(100_000)
    inner = rig.store(value)
    rig.device.synchronize()
    rig.area.finish()
    checked, original = Checked(inner, value, LABEL), inner.take

    def take(*, keep):
        tensor = original(keep=keep)
        rig.device.compute.synchronize()  # what torch.equal does on a device
        return tensor

    inner.take = take
    in_backward("cpu", lambda: checked.take(keep=True))
    checked._digest[0] += 1  # an injected failure leaves the right bytes
    rig.engine.inject(-errno.EAGAIN, count=2**31)  # the disk answers after take, and badly
    threading.Timer(0.2, lambda: rig.engine.inject(-errno.EIO, count=1)).start()
    with pytest.raises(OSError, match="read at offset"):
        in_backward("cpu", lambda: checked.take(keep=True))
    del inner.take


def test_of_failures_together_one_is_raised(rig):
    pairs = [rig.store(values(100_000, seed=i)) for i in range(4)]
    rig.device.synchronize()
    rig.area.finish()
    rig.engine.inject(-errno.EIO, count=100)
    for stored in pairs:
        stored.prefetch()
    with pytest.raises(OSError, match="read at offset"):
        rig.chain.check()
    rig.engine.inject()
    rig.transfers.poll()
    rig.engine.drain()


# --------------------------------------------------------------------------------------------------- ends


def test_close_in_mid_flight(device):
    """Everything at once: writes not begun, reads under way, tensors never taken, graphs still alive."""
    with spill_directory() as path:
        rig = Rig(device, path)
        pairs = [(rig.store(values(400_000, seed=i)), values(400_000, seed=i)) for i in range(6)]
        for stored, _ in pairs[:3]:
            stored.prefetch()
        begin = time.monotonic()
        for stored, _ in pairs[2:5]:
            stored.settle()
        del pairs[0]
        rig.close()
        assert time.monotonic() - begin < 20
        # What was settled is copied by PyTorch, which knows nothing of this device.
        device.spoils = False
        for stored, value in pairs[1:4]:
            result = stored.take(keep=True)
            device.synchronize()
            assert torch.equal(result, value)
        assert rig.area.staging.stats().mapped_bytes == 0


def test_what_cannot_come_home_is_raised_by_take_and_holds_nothing_else_up(device):
    """A session that ends brings every tensor of a live graph home: one that is lost must not lose the others."""
    with spill_directory() as path:
        rig = Rig(device, path)
        pairs = [(rig.store(values(300_000, seed=i)), values(300_000, seed=i)) for i in range(3)]
        device.synchronize()
        rig.area.finish()
        rig.engine.inject(-errno.EIO, count=1)
        for stored, _ in pairs:
            stored.settle()
        rig.engine.inject()
        rig.close()
        device.spoils = False
        for _ in range(2):
            with pytest.raises(OSError, match="read at offset") as caught:
                pairs[0][0].take(keep=True)
            assert caught.value.errno == errno.EIO
            assert caught.value.__context__ is None
        for stored, value in pairs[1:]:
            result = stored.take(keep=True)
            device.synchronize()
            assert torch.equal(result, value)


def test_dropped_tensors_give_everything_back(rig):
    for i in range(20):
        stored = rig.store(values(300_000, seed=i))
        if i % 3:
            stored.prefetch()
        if i % 3 == 2:
            rig.transfers.poll()
        del stored
    gc.collect()
    rig.device.synchronize()
    rig.area.finish()
    assert rig.area.store.stats().num_extents == 0
    rig.engine.drain()
    rig.transfers.poll()
    buffers = [rig.area.staging.try_take(256 * 1024) for _ in range(4)]
    assert None not in buffers, "staging is whole again"
    for buffer in buffers:
        buffer.release()


def test_full_extents_and_no_room(device):
    with spill_directory() as path:
        rig = Rig(device, path)
        rig.area.store._areas[0].budget_bytes = 512 * 1024
        first = rig.store(values(300_000))
        assert rig.store(values(300_000)) is None
        del first
        gc.collect()
        device.synchronize()
        rig.same(rig.take(rig.store(values(500_000))), values(500_000))
        rig.close()


def test_a_lost_device_ends_every_wait(rig):
    """Host functions are not called after a device failed: whoever waits for such a write learns why."""
    gate = threading.Event()
    rig.device.compute.run(gate.wait)
    stored = rig.store(values(100_000))
    rig.device.lost = True
    gate.set()
    begin = time.monotonic()
    with pytest.raises(LostDeviceError):
        stored.take(keep=True)
    with pytest.raises(OSError, match="never be released: the device is lost"):
        rig.area.finish()
    stored.settle()
    with pytest.raises(OSError, match="the device is lost"):
        stored.take(keep=True)
    assert time.monotonic() - begin < 5
    with pytest.raises(LostDeviceError):
        rig.transfers.finish()
    rig.device.lost, rig.device.closed = False, True  # a real one lets nobody wait for it any more
    rig.close()


def test_refused_copies_are_errors(rig, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(rig.device, "copy", lambda *_: "cudaErrorInvalidValue")
        with pytest.raises(memopt.MemoptError, match="cudaErrorInvalidValue"):
            rig.store(values(100_000))
    gc.collect()
    assert rig.area.store.stats().num_extents == 0
    assert rig.area.staging.stats().num_buffers == 0
