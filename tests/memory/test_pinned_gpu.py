"""The pool on a real CUDA device."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch

from memopt.memory.pinned import HostPool

pytestmark = pytest.mark.gpu
MIB = 1 << 20


def test_tensors_are_pinned_and_copies_are_right():
    with HostPool(64 * MIB, True) as pool:
        assert pool.stats().unlocked_reason == ""
        buffer = pool.take(8 * MIB + 4)
        host = buffer.tensor(torch.float32, (2 * MIB + 1,))
        assert host.is_pinned()
        device = torch.randn(2 * MIB + 1, device="cuda")
        host.copy_(device, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        event.synchronize()
        assert torch.equal(host, device.cpu())
        back = torch.empty_like(device)
        back.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        assert torch.equal(back, device)


def test_copies_really_are_asynchronous():
    with HostPool(1 << 30, True) as pool:
        host = pool.take(512 * MIB).tensor(torch.uint8, (512 * MIB,))
        device = torch.empty(512 * MIB, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        host.copy_(device, non_blocking=True)
        queued = time.perf_counter() - start
        torch.cuda.synchronize()
        assert queued < 0.25 * (time.perf_counter() - start)


def test_a_buffer_is_not_reused_under_a_copy():
    with HostPool(64 * MIB, True, growth_bytes=4096) as pool:
        device = torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda")
        for value in range(1, 30):
            buffer = pool.take(64 * MIB)
            host = buffer.tensor(torch.uint8, (64 * MIB,))
            host.fill_(value)
            torch.cuda._sleep(20_000_000)
            device.copy_(host, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            buffer.release(event)
            other = pool.take(64 * MIB)  # the cap has room for one: it must wait for the event
            other.tensor(torch.uint8, (64 * MIB,)).fill_(0)
            assert int(device.min()) == int(device.max()) == value
            other.release()


def test_locking_beside_compute_and_nothing_left():
    compute = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    pool = HostPool(4 << 30, True)
    pool.reserve({256 * MIB: 12})
    while threading.active_count() > 1 and pool.stats().locked_bytes < 12 * 256 * MIB:
        compute = (compute @ compute).clamp(-1, 1)
        torch.cuda.synchronize()
    pool.settle()
    stats = pool.stats()
    assert stats.locked_bytes == stats.mapped_bytes == 12 * 256 * MIB
    tensors = [pool.take(256 * MIB).tensor(torch.uint8, (256 * MIB,)) for _ in range(12)]
    assert all(tensor.is_pinned() for tensor in tensors)
    assert pool.stats().waste_bytes == 0
    pool.close()
    assert not any(tensor.is_pinned() for tensor in tensors)
    torch.cuda.synchronize()  # an unregistration that failed would surface here
    torch.empty(1, device="cuda").fill_(1)


def test_a_real_refusal_is_cleared():
    """Registering the same memory twice is refused by CUDA: the error must not surface at the next call."""
    with HostPool(64 * MIB, True) as pool:
        buffer = pool.take(16 * MIB)
        assert pool._cudart is not None
        error = pool._cudart.host_register(buffer.address, 16 * MIB)
        assert error == "cudaErrorHostMemoryAlreadyRegistered"
        torch.empty(1, device="cuda").fill_(1)
        torch.cuda.synchronize()
        assert buffer.tensor(torch.uint8, (16 * MIB,)).is_pinned()


def _kernel_gaps_s(until) -> list[float]:
    """Run kernels of about a millisecond back to back until told; return the gaps between them, sorted."""
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    marks = []
    torch.cuda.synchronize()
    while not until() or len(marks) < 200:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(5):
            b = a @ a
        end.record()
        marks.append((begin, end))
        if len(marks) > 20:
            marks[-20][1].synchronize()  # the queue stays as deep as a training loop's
    torch.cuda.synchronize()
    assert b.shape == a.shape
    return sorted(x[1].elapsed_time(y[0]) / 1e3 for x, y in itertools.pairwise(marks))


def test_trimming_beside_compute(capsys):
    """16 slabs of 256 MiB leave while kernels run: what is the longest gap between two of them?"""
    limit = time.perf_counter() + 2.0
    before = _kernel_gaps_s(lambda: time.perf_counter() > limit)
    with HostPool(5 << 30, True) as pool:
        pool.reserve({256 * MIB: 17})
        pool.settle()
        assert pool.trim_beside({}) == 16 * 256 * MIB
        during = _kernel_gaps_s(lambda: pool.stats().trims.num_slabs == 16)
        stats = pool.stats()
    with capsys.disabled():
        print(
            f"\ntrimming 16 x 256 MiB: longest gap {1e3 * during[-1]:.2f} ms (without: {1e3 * before[-1]:.2f}), "
            f"all gaps above 1 ms {1e3 * sum(g for g in during if g > 1e-3):.1f} ms (without: "
            f"{1e3 * sum(g for g in before if g > 1e-3):.1f}); {stats.trims}"
        )
    assert stats.mapped_bytes == stats.locked_bytes == 256 * MIB
    assert during[-1] < 0.2, (
        "one slab held the program's kernels up longer than registering one does"
    )
