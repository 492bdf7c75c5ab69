"""Stored tensors that die while transfers are under way, at any moment: in the collector, in a child, at the end."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading

import pytest
import torch

from memopt.activations.spill import SpillArea, SpillStored
from memopt.activations.stored import Label
from memopt.activations.transfers import Moved
from memopt.io import ExtentStore, open_engine
from memopt.memory.pinned import HostPool
from tests.io.test_uring import make_engine

LABEL = Label(region="layers.0", what="output")
MIB = 1 << 20


@pytest.fixture(params=["threads", "io_uring"])
def area(request, tmp_path):
    engine = open_engine("threads") if request.param == "threads" else make_engine()
    area = SpillArea(ExtentStore([(tmp_path, 16 * MIB)], engine), HostPool(4 * MIB, register=False))
    yield area
    area.close()
    engine.close()


def store(area: SpillArea, tensor: torch.Tensor) -> SpillStored:
    stored = SpillStored.from_cpu(tensor, area, LABEL, Moved())
    assert isinstance(stored, SpillStored)
    return stored


@pytest.mark.parametrize("is_reading", [False, True])
def test_letting_go_takes_no_lock(area, is_reading):
    """The collector runs `__del__` on a thread that may hold any of these locks: it would wait for itself."""
    stored = [store(area, torch.arange(MIB, dtype=torch.uint8))]
    area.finish()
    if is_reading:
        assert stored[0].prefetch()
    thread = threading.Thread(target=stored.clear)
    with area.store._lock, area.store.engine._lock, area.store.engine._gate, area.staging._changed:
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
    assert area.store.stats().num_extents == 0
    area.poll()
    area.store.engine.drain()
    area.poll()
    assert area.staging.stats().in_use_bytes == 0


def test_what_was_let_go_is_used_again(area):
    """Sixteen times the extents and forty times the staging there is, each dropped with its read under way."""
    for i in range(64):
        stored = store(area, torch.full((3 * MIB,), i, dtype=torch.uint8))
        stored.prefetch()
        del stored
    assert area.store.stats().in_use_bytes <= 16 * MIB


def test_memory_and_extents_of_garbage_cycles(area):
    """Cycles die at random allocations, also inside of the store and the engine; no byte may be lost or shared."""
    rng, kept = random.Random(0), []
    before = gc.get_threshold()
    try:
        for i in range(4000):
            gc.set_threshold(rng.randrange(20, 200), 2, 2)
            stored = store(
                area, torch.full((rng.randrange(1, 60_000),), i % 251, dtype=torch.uint8)
            )
            if rng.random() < 0.5:
                stored.prefetch()
            cycle: list[object] = [stored]
            cycle.append(cycle)
            kept.append((stored, i % 251))
            del stored, cycle
            if len(kept) > 20:
                stored, value = kept.pop(rng.randrange(len(kept)))
                assert bool((stored.take(keep=False) == value).all())
                del stored
    finally:
        gc.set_threshold(*before)
    kept.clear()
    gc.collect()
    area.finish()
    area.store.engine.drain()
    assert area.store.stats().in_use_bytes == 0
    free = area.store._areas[0].free
    assert free._by_size == [(free.free_bytes, 0)]  # one hole: everything that was ever reserved


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_may_let_go_of_everything(area):
    """A data loader's worker, forked in the middle of a step: its copies die, the parent's transfers go on."""
    kept = [store(area, torch.full((MIB // 2,), i, dtype=torch.uint8)) for i in range(8)]
    for stored in kept[:3]:
        stored.prefetch()
    with area.store._lock, area.store.engine._lock:  # as another thread may have held them
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            kept.clear()
            gc.collect()
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    for i, stored in enumerate(kept):
        assert bool((stored.take(keep=False) == i).all())
