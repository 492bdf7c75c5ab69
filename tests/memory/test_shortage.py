"""A system without memory or threads for what a pool asks: a smaller cap, never an error in the middle of a step."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import memopt
from memopt._resources import Resources
from memopt.activations.transfers import CpuTransfers
from memopt.memory import _builder, _slab
from memopt.memory._packing import packed
from memopt.memory.pinned import HostPool, HostPoolFull
from tests.io.test_interrupted_close import every_point
from tests.memory.test_pinned import MIB, PAGE, FakeCudart, SlowCudart


def refuse_to_map(patch, *, above_bytes: int) -> list[int]:
    """Have every anonymous mapping above a size fail, as under RLIMIT_AS; return the sizes that were refused."""
    real, refused = mmap.mmap, []

    def mapping(fileno, length, **options):
        if fileno == -1 and length > above_bytes:
            refused.append(length)
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return real(fileno, length, **options)

    patch.setattr(_slab.mmap, "mmap", mapping)
    return refused


def refuse_to_fault(patch, *, after: int = 0) -> None:
    """Have faulting pages in fail, as in a full memory control group."""
    real, calls = _slab._libc.madvise, []

    def madvise(address, nbytes, advice):
        calls.append(nbytes)
        if len(calls) <= after:
            return real(address, nbytes, advice)
        ctypes.set_errno(errno.ENOMEM)
        return -1

    patch.setattr(_slab, "_libc", type("Libc", (), {"madvise": staticmethod(madvise)}))


def test_what_cannot_be_mapped_is_no_room_and_is_not_asked_for_again(monkeypatch):
    with HostPool(64 * MIB, register=False) as pool:
        refused = refuse_to_map(monkeypatch, above_bytes=8 * MIB)
        kept = pool.take(4 * MIB)  # a shared slab of 16 MiB is refused, the buffer's own is not
        assert pool.try_take(20 * MIB) is None
        assert pool.try_take(20 * MIB) is None
        with pytest.raises(HostPoolFull, match=r"20971520 bytes asked .* Cannot allocate memory"):
            pool.take(20 * MIB)
        assert refused == [16 * MIB]  # 4 + 20 MiB are more than the 16 that failed
        assert len(kept.memoryview) == 4 * MIB
        assert pool.take(8 * MIB).nbytes == 8 * MIB  # what there is, is still given
        assert pool.stats().shortage.startswith(f"the system refused {16 * MIB} bytes of host")


def test_what_cannot_be_faulted_in_is_no_room(monkeypatch, caplog):
    cudart = FakeCudart()
    with HostPool(64 * MIB, register=True, cudart=cudart) as pool:
        with monkeypatch.context() as patch:
            refuse_to_fault(patch)
            with pytest.raises(HostPoolFull, match="Cannot allocate memory"):
                pool.take(MIB)
            assert pool.reserve({MIB: 3}) == 3 * MIB  # more than what failed: not tried again
            assert pool.try_take(MIB, wait=False) is None
            assert pool.settle()
        assert pool.stats().mapped_bytes == 0
        assert cudart.calls == []
        assert pool.take(MIB // 2).is_locked  # and the pool goes on


def test_a_failure_in_the_background_is_nobodys_error(monkeypatch):
    """It was raised at the next root forward, or by whichever tensor came first, and ended the run."""
    with HostPool(64 * MIB, register=False, chunk_bytes=4 * MIB, num_threads=1) as pool:
        refuse_to_fault(monkeypatch, after=2)
        assert pool.reserve({4 * MIB: 6}) == 0
        assert pool.settle(10.0)
        stats = pool.stats()
        assert stats.mapped_bytes == 8 * MIB
        assert "faulting in" in stats.shortage
        buffers = [pool.try_take(4 * MIB) for _ in range(6)]
        assert sum(buffer is not None for buffer in buffers) == 2


def test_a_system_without_threads_is_no_room(monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    pool = HostPool(64 * MIB, register=False)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert pool.reserve({MIB: 3}) == 3 * MIB
        assert pool.try_take(3 * MIB) is None
    assert "can't start new thread" in pool.stats().shortage
    pool.close()


@pytest.mark.parametrize("num_begun", range(4))
def test_an_interrupted_start_leaves_nothing_to_wait_for(monkeypatch, num_begun):
    """A slab of four pieces of which some were never given to the threads: `close` waited for it for ever."""
    cudart = FakeCudart()
    pool = HostPool(64 * MIB, register=True, cudart=cudart)
    monkeypatch.setattr(_builder, "_PIECE_BYTES", MIB)
    real, calls = _builder.ThreadPoolExecutor.submit, []

    def submit(self, *args):
        if len(calls) == num_begun:
            raise KeyboardInterrupt
        calls.append(args)
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(_builder.ThreadPoolExecutor, "submit", submit)
        with pytest.raises(KeyboardInterrupt):
            pool.reserve({4 * MIB: 1})
    assert pool.settle(10.0)
    assert pool.stats().mapped_bytes == 0
    assert pool.take(4 * MIB).is_locked
    pool.close()
    assert cudart.live == {}


def test_a_slab_finished_after_its_start_was_interrupted_is_unlocked(monkeypatch):
    cudart = FakeCudart()
    pool = HostPool(64 * MIB, register=True, cudart=cudart)
    real = _builder.SlabBuilder.start

    def start(self, slab, done):
        real(self, slab, done)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_builder.SlabBuilder, "start", start)
        with pytest.raises(KeyboardInterrupt):
            pool.reserve({MIB: 1})
    pool._builder.stop()
    assert cudart.live == {}
    assert pool.stats().mapped_bytes == pool._free.free_bytes == 0
    pool.close()


def test_close_does_not_lock_what_nobody_will_use():
    """Leaving the context in the first steps waited until a hundred GiB were locked, to unlock them."""
    cudart = SlowCudart()
    pool = HostPool(64 * MIB, register=True, chunk_bytes=MIB, cudart=cudart)
    pool.reserve({MIB: 40})
    begin = time.perf_counter()
    pool.close()
    assert time.perf_counter() - begin < 1.0
    assert cudart.count("register") < 10
    assert cudart.live == {}


def test_a_program_that_ends_does_not_wait_for_locking():
    """One that failed between `start` and `stop`: its end waited for all of it."""
    code = (
        "import time; begin = time.perf_counter()\n"
        "from tests.memory.test_pinned import MIB, SlowCudart\n"
        "from memopt.memory.pinned import HostPool\n"
        "import atexit; atexit.register(lambda: print(time.perf_counter() - begin))\n"
        "pool = HostPool(200 * MIB, register=True, chunk_bytes=MIB, cudart=SlowCudart())\n"
        "pool.reserve({MIB: 100})\n"  # 10 s with the pauses
        "begin = time.perf_counter()\n"
        "raise SystemExit\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2.0, done.stderr


def test_packing_fills_old_slabs_then_new_ones_of_a_chunk_within_the_room():
    assert packed([5, 4, 3, 2, 2], old=[4, 2], room=9, chunk_bytes=6) == ([5, 3], 2)


def test_a_run_without_memory_for_staging_recomputes_and_says_why(tmp_path, monkeypatch):
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)

        def forward(self, x):
            return x + self.down(torch.nn.functional.gelu(self.up(x)))

    def steps(run_in):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*[Block() for _ in range(3)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x, losses = torch.randn(512, 64), []
        with run_in(model, optimizer) as run:
            for _ in range(3):
                loss = model(x).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        return losses, run

    class Plain:
        def __init__(self, *_) -> None: ...
        def __enter__(self): ...
        def __exit__(self, *_): ...

    plain, _ = steps(Plain)
    budget = memopt.Budget(device="1GiB", ssd=f"{tmp_path}:64MiB")
    refuse_to_map(monkeypatch, above_bytes=PAGE)
    losses, run = steps(lambda *a: memopt.optimize(*a, budget=budget, plan="ssd"))
    assert losses == plain
    assert any(
        "Cannot allocate memory: some tensors were recomputed" in n for n in run.report().notes
    )
    assert run.report().moved.ssd_write_bytes == 0


def test_the_report_says_that_host_memory_is_pageable():
    pool = HostPool(4 * MIB, register=True, cudart=FakeCudart(refuse_after=0))
    transfers = CpuTransfers(None, 0)
    budget = SimpleNamespace(notes=())
    resources = Resources(torch.device("cuda"), budget, None, transfers, pool, None, None)
    assert resources.pageable_notes() == []
    pool.take(MIB)
    (note,) = resources.pageable_notes()
    assert note.startswith(
        "host memory is pageable, so copies do not run beside compute: page-locking"
    )
    assert note.endswith("cudaErrorMemoryAllocation")
    pool.close()


@pytest.mark.parametrize("call", ["take", "reserve", "trim_beside", "settle"])
def test_a_forked_child_is_told_and_does_not_wait(call):
    """Its parent's threads will never lock anything for it, and may hold the pool's lock for ever."""
    cudart = SlowCudart()
    pool = HostPool(64 * MIB, register=True, chunk_bytes=MIB, cudart=cudart)
    pool.reserve({MIB: 8})
    calls = {
        "take": lambda: pool.take(MIB),
        "reserve": lambda: pool.reserve({MIB: 1}),
        "trim_beside": lambda: pool.trim_beside({}),
        "settle": pool.settle,
    }
    with pool._lock:
        child = os.fork()
        if child == 0:
            signal.alarm(5)
            try:
                calls[call]()
            except ValueError as error:
                pool.close()
                os._exit(0 if f"made in process {os.getppid()}" in str(error) else 1)
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    pool.close()


def test_a_reservation_interrupted_anywhere_leaves_a_whole_pool(monkeypatch):
    """Ctrl-C while a plan's memory is asked for: `close` waited for a slab that nobody was making."""
    monkeypatch.setattr(_builder, "_PIECE_BYTES", MIB)

    def attempt(interrupt):
        cudart = FakeCudart()
        pool = HostPool(64 * MIB, register=True, chunk_bytes=3 * MIB, cudart=cudart)
        interrupt.during(lambda: pool.reserve({3 * MIB: 3}))
        assert pool.settle(10.0), interrupt.where
        stats = pool.stats()
        assert stats.mapped_bytes == pool._free.free_bytes <= 9 * MIB, interrupt.where
        pool.close()
        assert cudart.live == {}, interrupt.where

    assert every_point(attempt, package=os.sep.join(("memopt", "memory", ""))) > 50
