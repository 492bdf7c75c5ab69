"""Tables through kept page-locked memory, with copies that a fake device makes late."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from memopt.ops import transfer
from memopt.ops.transfer import PinnedRoom
from memopt.optim import Frugal


class Copy:
    """A copy on its way, and the event after it."""

    def __init__(self, room, target, source):
        self.room, self.target, self.source = room, target, source

    def query(self):
        return self not in self.room.on_their_way

    def synchronize(self):
        while not self.query():  # a stream is in order
            self.room.run_one()


class Room(PinnedRoom):
    """A room whose copies run when they are waited for, or by `run_one`."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.on_their_way, self.allocated = [], []

    def run_one(self):
        found = self.on_their_way.pop(0)
        found.target.copy_(found.source)

    def _is_locked(self):
        return True

    def _allocate(self, nbytes):
        self.allocated.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    def _send(self, target, source):
        self.on_their_way.append(Copy(self, target, source))
        return self.on_their_way[-1]


def send(room, number, size=10):
    target = torch.full((size,), -1, dtype=torch.int32)
    room.copy_into(target, np.full(size, number, dtype=np.int32))
    return target


def test_memory_is_used_again_when_its_copy_has_arrived():
    room = Room()
    for number in range(6):
        target = send(room, number)
        room.run_one()
        assert target.eq(number).all()
    assert room.allocated == [40]
    assert room.num_bytes() == 40


def test_what_is_on_its_way_is_not_overwritten():
    room = Room()
    targets = [send(room, number) for number in range(3 * room.MOST_SLOTS)]
    assert len(room.allocated) == room.MOST_SLOTS  # the others waited, each for the oldest
    assert len(room.on_their_way) == room.MOST_SLOTS
    while room.on_their_way:
        room.run_one()
    for number, target in enumerate(targets):
        assert target.eq(number).all()


def test_a_room_grows_and_takes_the_smallest_slot_that_fits():
    room = Room()
    targets = [send(room, 0, size=10), send(room, 1, size=1000)]
    while room.on_their_way:
        room.run_one()
    targets += [send(room, 2, size=10), send(room, 3, size=1000)]
    assert room.allocated == [40, 4000]
    while room.on_their_way:
        room.run_one()
    targets.append(send(room, 4, size=3000))  # instead of a slot that was too small
    room.run_one()
    assert room.allocated == [40, 4000, 12000]
    assert len(room._slots) == 2
    for number, target in enumerate(targets):
        assert target.eq(number).all()


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.float32])
def test_numbers_arrive_in_the_tables_shape(dtype):
    room, values = Room(), np.arange(24).astype(dtype)
    for side in (room, PinnedRoom(torch.device("cpu"))):
        target = torch.zeros(2, 12, dtype=torch.from_numpy(values).dtype)
        side.copy_into(target, values)
        while room.on_their_way:
            room.run_one()
        assert target.equal(torch.from_numpy(values).view(2, 12))


def test_a_cpu_needs_no_room():
    room = PinnedRoom(torch.device("cpu"))
    assert send(room, 5).eq(5).all()
    assert room.num_bytes() == 0


def test_a_forked_child_does_not_free_what_it_inherited(monkeypatch):
    kept = []
    monkeypatch.setattr(transfer, "_inherited", kept)
    here, memories = os.getpid(), []
    for pid in (here, here + 1):
        room = Room()
        send(room, 1)
        room.run_one()
        memories.append(room._slots[0].memory.data_ptr())
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        del room
        gc.collect()  # the fake copies know their room
    assert [slot.memory.data_ptr() for slot in kept] == memories[1:]


def test_copies_of_an_optimizer_do_not_have_its_room():
    param = torch.nn.Parameter(torch.randn(4, 6))
    optimizer = Frugal([param], selection="rows")
    param.grad = torch.randn_like(param)
    optimizer.step()
    room = optimizer._groups[0].buckets[0].room = Room()
    send(room, 1)
    room.run_one()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert not other._groups[0].buckets[0].room.num_bytes()
    assert not any("room" in values for values in optimizer.state_dict()["state"].values())


# ------------------------------------------------------------------------- on a GPU
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tables_reach_a_busy_gpu_without_new_memory_or_a_wait():
    device = torch.device("cuda", torch.cuda.current_device())
    room, size = PinnedRoom(device), 75_000
    target = torch.zeros(size, dtype=torch.int32, device=device)
    for number in range(3):
        room.copy_into(target, np.full(size, number, dtype=np.int32))
        torch.cuda.synchronize()
    assert len(room._slots) == 1
    held = room._slots[0].memory.data_ptr()
    results = []
    for number in range(2 * room.MOST_SLOTS):
        torch.cuda._sleep(20_000_000)  # some 10 ms: the next copies wait for it
        room.copy_into(target, np.full(size, number, dtype=np.int32))
        if number == room.MOST_SLOTS - 1:
            assert not room._slots[-1].sent.query()  # the host did not wait
        results.append(target.clone())
    torch.cuda.synchronize()
    assert [int(r.unique()) for r in results] == list(range(2 * room.MOST_SLOTS))
    assert len(room._slots) == room.MOST_SLOTS
    assert held in {slot.memory.data_ptr() for slot in room._slots}
    assert all(slot.memory.is_pinned() for slot in room._slots)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_on_two_streams_are_both_waited_for():
    device = torch.device("cuda", torch.cuda.current_device())
    room, side = PinnedRoom(device), torch.cuda.Stream()
    room.MOST_SLOTS = 1
    one, two = (torch.zeros(1000, dtype=torch.int64, device=device) for _ in range(2))
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        room.copy_into(one, np.full(1000, 1))
    room.copy_into(two, np.full(1000, 2))
    torch.cuda.synchronize()
    assert one.eq(1).all()
    assert two.eq(2).all()


FORKS = """
import gc, os, sys
import numpy, torch
from memopt.ops.transfer import PinnedRoom

room = PinnedRoom(torch.device("cuda", 0))
target = torch.zeros(8, dtype=torch.int64, device="cuda:0")
room.copy_into(target, numpy.arange(8))
torch.cuda.synchronize()
pid = os.fork()
if pid == 0:
    del room
    gc.collect()
    os._exit(0)
sys.exit(os.waitpid(pid, 0)[1] != 0)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_forked_child_survives_the_end_of_a_room_it_inherited():
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", FORKS], check=True, cwd=root, timeout=120)
