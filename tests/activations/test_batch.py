"""Fetches of one round as batches, on the fake device: bytes, order, events, what is left out of a batch."""

from __future__ import annotations

import contextlib
import ctypes
import time

import pytest
import torch
from _fake_cuda import FakeDevice, fake_cuda

import memopt.activations.batch as batch_module
from memopt.activations.cuda import CudaTransfers
from memopt.activations.stored import Label
from memopt.memory.pinned import HostPool
from memopt.ops import copies

MIB = 1 << 20
LABEL = Label(region="block", what="output")


class FakeLibrary:
    """libmemopt_cuda's copies: reads the arrays before the call returns, as the real one does."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.batches: list[int] = []

    def memopt_copy(self, pointer, batched: int, stream: int) -> int:
        assert batched
        given = pointer._obj
        count = given.count
        self.batches.append(count)
        arrays = [
            (ctypes.c_void_p * count).from_address(given.destinations)[:],
            (ctypes.c_void_p * count).from_address(given.sources)[:],
            (ctypes.c_size_t * count).from_address(given.sizes)[:],
        ]
        for destination, source, nbytes in zip(*arrays, strict=True):
            self.device.copy(stream, destination, source, nbytes)
        return 0


@pytest.fixture
def device(monkeypatch):
    with fake_cuda(monkeypatch, FakeDevice()) as device:
        yield device


@pytest.fixture
def library(device, monkeypatch):
    library = FakeLibrary(device)
    monkeypatch.setattr(copies, "_native", lambda: (library, True, ""))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    return library


@pytest.fixture
def transfers(device, library, monkeypatch):
    keep_memory(device, monkeypatch)
    pool = HostPool(64 * MIB, True, cudart=device)
    transfers = CudaTransfers(torch.device("cpu"), pool, None, 1 << 30)
    yield transfers
    transfers.close()
    device.synchronize()


def values(i: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(i)
    return torch.randn(130_000 + 1001 * i, generator=generator)


def store(transfers, tensor):
    return transfers.store(tensor, "host", LABEL, clone_first=False, wait=True)


def keep_memory(device, monkeypatch, on_allocation=lambda _: None):
    """Let landings live as long as the device: a copy into one that was dropped still runs, as in CUDA's own pool."""
    empty = torch.empty_strided

    def keep(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        device.allocated.append(tensor)
        on_allocation(tensor)
        return tensor

    monkeypatch.setattr(torch, "empty_strided", keep)


def late_memory(device, monkeypatch):
    """Let kernels asked for before still write to memory that is allocated for a landing."""

    def write_late(tensor):
        device.compute.run(lambda: ctypes.memset(tensor.data_ptr(), 0xEE, tensor.nbytes))

    keep_memory(device, monkeypatch, write_late)


def seen_by_a_kernel(device, tensor):
    seen = torch.empty(tensor.numel(), dtype=tensor.dtype)
    device.compute.run(lambda: ctypes.memmove(seen.data_ptr(), tensor.data_ptr(), tensor.nbytes))
    return seen, device.compute.record_event()


def test_a_round_of_small_tensors(device, library, transfers, monkeypatch):
    stored = [store(transfers, values(i)) for i in range(40)]
    late_memory(device, monkeypatch)
    device.compute.run(lambda: time.sleep(0.1))
    with transfers.together():
        for item in stored:
            item.prefetch()
    assert sum(library.batches) == 40
    assert 2 <= len(library.batches) <= 3, "16 MiB at a time"
    results = [seen_by_a_kernel(device, item.take(keep=True)) for item in stored]
    for i, (seen, done) in enumerate(results):
        done.synchronize()
        assert torch.equal(seen, values(i))
    assert transfers.moved.h2d_bytes == sum(values(i).nbytes for i in range(40))


def test_buffers_are_kept_until_their_batch_has_read_them(device, library, transfers):
    """Dropped and handed out again at once: the copy in must have happened before."""
    device.spoils = False
    for i in range(30):
        stored = [store(transfers, values(i + k)) for k in range(4)]
        with transfers.together():
            for item in stored:
                item.prefetch()
        results = [seen_by_a_kernel(device, item.take(keep=True)) for item in stored]
        del stored, item
        spoilt = [transfers.host.take(n) for n in (8 * MIB, 8 * MIB, 8 * MIB, 8 * MIB)]
        for buffer in spoilt:
            ctypes.memset(buffer.address, 0xDD, buffer.nbytes)
            buffer.release()
        for k, (seen, done) in enumerate(results):
            done.synchronize()
            assert torch.equal(seen, values(i + k))


def test_large_tensors_and_nested_rounds(library, transfers):
    device_tensor = torch.randn(5 * MIB // 4)
    large, small = store(transfers, device_tensor), store(transfers, values(0))
    with transfers.together(), transfers.together():
        small.prefetch()
        large.prefetch()
        assert library.batches == [1], "what was asked before goes before"
    assert torch.equal(large.take(keep=True), device_tensor)
    with transfers.together():
        pass
    assert library.batches == [1]


def test_an_error_inside_still_queues_what_was_begun(device, library, transfers):
    stored = store(transfers, values(0))

    def body():
        with transfers.together():
            stored.prefetch()
            raise KeyError("the program's own")

    with pytest.raises(KeyError):
        body()
    seen, done = seen_by_a_kernel(device, stored.take(keep=True))
    done.synchronize()
    assert torch.equal(seen, values(0))


def test_without_the_native_part_nothing_changes(library, transfers, monkeypatch):
    monkeypatch.setattr(batch_module, "copies_status", lambda: (False, "not built"))
    stored = store(transfers, values(0))
    with transfers.together():
        stored.prefetch()
    assert library.batches == []
    assert torch.equal(stored.take(keep=True), values(0))
