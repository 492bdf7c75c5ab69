"""Batched copies on a real device: every byte, in both directions, at any size and address."""

from __future__ import annotations

import random

import pytest
import torch

from memopt.memory.pinned import HostPool
from memopt.ops.copies import copies_status, copy_batch

pytestmark = pytest.mark.gpu
MIB = 1 << 20
IMPLS = ["native", "loop", "reference"]


@pytest.fixture(autouse=True)
def native():
    available, reason = copies_status()
    if not available:
        pytest.skip(reason)


def pieces(total: torch.Tensor, sizes: list[int], gap: int) -> list[torch.Tensor]:
    """Cut views of ``sizes`` bytes, ``gap`` bytes apart, so that most begin at odd addresses."""
    views, at = [], gap
    for size in sizes:
        views.append(total[at : at + size])
        at += size + gap
    assert at <= total.numel()
    return views


def test_the_driver_here_batches():
    """On the machines this is developed for; a loop would pass every other test."""
    available, reason = copies_status()
    assert available
    assert reason == ""


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gap", [0, 1, 512])
def test_many_odd_pieces_bitwise_and_neighbours_untouched(impl, gap):
    generator = random.Random(gap)
    sizes = [generator.choice([1, 3, 511, 4096, 65_537, 262_144]) for _ in range(400)]
    room = sum(sizes) + gap * (len(sizes) + 1)
    with HostPool(4 * room + (32 << 20), True) as pool:
        there, back = (pool.take(room).tensor(torch.uint8, (room,)) for _ in range(2))
        there.random_(0, 256)
        back.fill_(0x55)
        device = torch.full((room,), 0xAA, dtype=torch.uint8, device="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        host, card, home = (pieces(t, sizes, gap) for t in (there, device, back))
        copy_batch(card, host, stream, impl=impl)
        copy_batch(home, card, stream, impl=impl)
        stream.synchronize()
        for a, b, c in zip(host, card, home, strict=True):
            assert torch.equal(a, c)
            assert torch.equal(a, b.cpu())
        total = sum(sizes)
        assert int((back == 0x55).sum()) >= room - total
        untouched = torch.ones(room, dtype=torch.bool)
        at = gap
        for size in sizes:
            untouched[at : at + size] = False
            at += size + gap
        assert bool((back[untouched] == 0x55).all())
        assert bool((device.cpu()[untouched] == 0xAA).all())


@pytest.mark.parametrize("impl", ["native", "loop"])
def test_in_stream_order(impl):
    """50 times: kernels write what goes out and overwrite what came in, on the stream of the copies."""
    count, size = 64, 65_536
    stream = torch.cuda.Stream()
    with HostPool(64 * MIB, True) as pool:
        host = [pool.take(size).tensor(torch.uint8, (size,)) for _ in range(count)]
        card = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(count)]
        sums = torch.zeros(50, count, dtype=torch.int64, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for step in range(50):
                torch.cuda._sleep(100_000)
                for i, tensor in enumerate(card):
                    tensor.fill_((step + i) % 251)
                copy_batch(host, card, stream, impl=impl)
                for tensor in card:
                    tensor.fill_(255)
                copy_batch(card, host, stream, impl=impl)
                for i, tensor in enumerate(card):
                    sums[step, i] = tensor.sum(dtype=torch.int64)
        stream.synchronize()
    expected = [[(step + i) % 251 * size for i in range(count)] for step in range(50)]
    assert sums.cpu().tolist() == expected


def test_default_stream_pageable_memory_and_one_piece():
    source = torch.randn(1000)
    device = torch.empty(1000, device="cuda")
    copy_batch([device], [source])  # pageable: PyTorch's way
    assert torch.equal(device.cpu(), source)
    with pytest.raises(ValueError, match="page-locked"):
        copy_batch([device], [source], impl="native")
    locked = torch.randn(1000).pin_memory()
    for impl in IMPLS:
        device.zero_()
        copy_batch([device], [locked], impl=impl)
        torch.cuda.synchronize()
        assert torch.equal(device.cpu(), locked)
    copy_batch([device[:0]], [locked[:0]], impl="native")
