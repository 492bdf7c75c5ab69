"""The chain device -> staging -> SSD and back on a real device: bytes, races, errors, bounds, ends.

Also the fetches of small host tensors in batches. The same chain runs on a fake device in test_chain.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from _bitwise import (
    Program,
    compare,
    notes_of,
    plain_run,
    random_plan,
    run_memopt,
    spill_directory,
    trace_of,
)
from _fake_cuda import in_backward
from test_races_gpu import SLOW_COMPUTE, SPIN_CYCLES, STRESSES, busy_link, host_plan
from torch import nn

import memopt
from memopt.activations.cuda import CudaTransfers
from memopt.activations.spill import SpillArea
from memopt.activations.stored import Label
from memopt.io import ExtentStore, open_engine
from memopt.memory.pinned import HostPool
from memopt.memory.streams import Words, open_stream_calls
from memopt.types.plan import Plan

pytestmark = pytest.mark.gpu
MIB = 1 << 20
LABEL = Label(region="block", what="output")
ROOT = Path(__file__).resolve().parents[2]


def put(transfers, tensor, placement="ssd"):
    return transfers.store(tensor, placement, LABEL, clone_first=False, wait=True)


@contextlib.contextmanager
def transfers_on(path, *, staging=32 * MIB, host=64 * MIB, engine="io_uring", budget=256 * MIB):
    """Real transfers with little staging."""
    device = torch.device("cuda", torch.cuda.current_device())
    with open_engine(engine, directory=path) as io:
        area = SpillArea(ExtentStore([(path, budget)], io), HostPool(staging, True))
        transfers = CudaTransfers(device, HostPool(host, True), area, 1 << 30)
        try:
            yield transfers
        finally:
            transfers.close()


@pytest.fixture
def transfers():
    with spill_directory() as path, transfers_on(path) as transfers:
        assert transfers.chain is not None, transfers.chain_reason
        yield transfers


def test_this_machine_has_the_native_way():
    """Where a driver lacks it everything below would pass over the fallback."""
    calls, reason = open_stream_calls(torch.device("cuda", torch.cuda.current_device()))
    assert calls is not None, reason


@pytest.mark.parametrize(
    "shape", [(65_536,), (65_537,), (33, 1025), (3 * MIB + 77,), (17 * MIB + 3,), (40 * MIB + 1,)]
)
@pytest.mark.parametrize("ahead", [True, False])
def test_round_trip(transfers, shape, ahead):
    """From staging while the write is under way, then from the disk; the last size is larger than all staging."""
    source = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    expected = source.clone()
    stored = put(transfers, source)
    stored.protect()
    source.fill_(0)
    for source_of_bytes in ("staging", "disk"):
        if source_of_bytes == "disk":
            transfers.finish()
            before = transfers.moved.ssd_read_bytes
        if ahead:
            stored.prefetch()
        torch.full_like(expected, 0xEE)
        assert torch.equal(stored.take(keep=True), expected)
    assert transfers.moved.ssd_read_bytes - before == stored.nbytes
    assert transfers.spill.staging.stats().peak_mapped_bytes <= 32 * MIB


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool, torch.complex64])
def test_dtypes_and_strides(transfers, dtype):
    base = torch.randint(0, 2, (300, 70, 11), device="cuda").to(dtype).permute(2, 0, 1)
    stored = put(transfers, base)
    back = stored.take(keep=True)
    assert back.stride() == base.stride()
    assert torch.equal(back, base)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("busy", [False, True])
def test_many_odd_tensors_with_compute_beside(transfers, seed, busy):
    """Out, dropped, fetched ahead and taken in any order while kernels run; freed memory is spoiled."""
    generator = random.Random(seed)
    work = torch.randn(1024, 1024, device="cuda")
    live, wrong = [], torch.zeros((), dtype=torch.int64, device="cuda")
    with busy_link() if busy else contextlib.nullcontext():
        for step in range(120):
            work = torch.tanh(work @ work)
            size = generator.randint(65_536, 3 * MIB)
            source = torch.full((size,), step % 251, dtype=torch.uint8, device="cuda")
            live.append((put(transfers, source), step % 251, size))
            del source
            torch.full((size,), 0xEE, dtype=torch.uint8, device="cuda")
            if step % 10 == 9:
                transfers.finish()  # the rest of the writes: what follows is read from the disk
            if len(live) > 12:
                for stored, _, _ in generator.sample(live, 6):
                    stored.prefetch()
                for _ in range(4):
                    stored, value, size = live.pop(generator.randrange(len(live)))
                    if generator.random() < 0.8:
                        wrong += (stored.take(keep=True) != value).sum()
            transfers.poll()
        for stored, value, _ in live:
            wrong += (stored.take(keep=True) != value).sum()
    assert int(wrong) == 0
    del stored, live
    gc.collect()
    transfers.finish()
    assert transfers.spill.store.stats().num_extents == 0


SIZE = 20 * 1024


class Block(nn.Module):
    """Element-wise ops on 80 KiB, one of them in place over an op output that is on its way out."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(SIZE) * 0.1)

    def forward(self, x):
        if SLOW_COMPUTE["on"]:
            torch.cuda._sleep(SPIN_CYCLES)
        h = x * self.w
        h.mul_(1.25)
        k = torch.sin(h)
        k = k * torch.sigmoid(k + x)
        torch.full((SIZE,), float("nan"), device=x.device)  # takes whatever block was freed last
        return x + torch.tanh(k)


class Net(nn.Module):
    """A list of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(8)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def _step(model, i):
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(i)).cuda()
    loss = model(x).square().mean()
    torch.full((4 * SIZE,), float("nan"), device="cuda")
    loss.backward()
    return loss


PROGRAM = Program(build=Net, step=_step, regions=["layers"], device="cuda", num_steps=50)


def ssd_plan(trace, **settings):
    """`host_plan` with everything on SSD."""
    text = json.dumps(host_plan(trace, **settings).to_dict()).replace('"host"', '"ssd"')
    return Plan.from_dict(json.loads(text))


@pytest.mark.parametrize(
    ("stress", "prefetch_bytes"),
    [
        ("calm", 1 << 30),
        ("late copies", 1 << 30),
        ("late kernels", 1 << 30),
        ("late copies", 1),
    ],
)
def test_fifty_steps_of_small_tensors(stress, prefetch_bytes):
    plan = ssd_plan(trace_of(PROGRAM), prefetch_bytes=prefetch_bytes)
    with STRESSES[stress]():
        record = run_memopt(PROGRAM, plan)
    compare(plain_run(PROGRAM), record)
    assert "driven from Python" not in notes_of(record.run)
    measured = record.run.report().to_dict()["measured"]
    assert measured["ssd_bytes"] >= 8 * SIZE * 4, "the plan moved next to nothing"


@pytest.mark.parametrize("seed", [0, 1])
def test_mixes_with_batched_fetches(seed):
    plan = random_plan(trace_of(PROGRAM), seed, ("device", "host", "ssd", "recompute"))
    with busy_link():
        compare(plain_run(PROGRAM), run_memopt(PROGRAM, plan, strict=bool(seed)))


# ------------------------------------------------------------------------------------------------- errors


def test_a_failed_write_surfaces(transfers):
    engine = transfers.spill.store.engine
    engine.inject(-errno.ENOSPC, count=1)
    stored = put(transfers, torch.ones(300_000, device="cuda"))
    torch.cuda.synchronize()
    deadline = time.monotonic() + 10
    with pytest.raises(OSError, match="write at offset") as caught:
        while time.monotonic() < deadline:
            transfers.poll()
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="write at offset"):
        stored.take(keep=True)


def test_a_failed_read_surfaces_before_backward_returns(transfers):
    engine = transfers.spill.store.engine
    source = torch.randn(300_000, device="cuda")
    stored = put(transfers, source)
    torch.cuda.synchronize()
    transfers.finish()
    taken = []

    def body():
        engine.inject(-errno.EAGAIN, count=2**31)  # the disk does not answer yet
        stored.prefetch()
        taken.append(stored.take(keep=True) * 2)
        time.sleep(0.05)
        assert not torch.cuda.current_stream().query(), "the device must wait for the disk"
        engine.inject(-errno.EIO, count=1)

    with pytest.raises(OSError, match="read at offset") as caught:
        in_backward("cuda", body)
    assert caught.value.errno == errno.EIO
    torch.cuda.synchronize()  # nothing hangs on the word
    transfers.poll()
    in_backward("cuda", lambda: taken.append(stored.take(keep=True)))
    assert torch.equal(taken[1], source)


def test_the_model_survives_a_failing_disk():
    """Errors in the loop: the step that meets one raises it, and the model is whole after the context."""
    model = Net().cuda()
    with spill_directory() as path:
        budget = memopt.Budget(ssd=f"{path}:256MiB")
        with (
            pytest.raises(OSError, match="at offset") as caught,
            memopt.optimize(model, plan="ssd", regions=["layers"], budget=budget) as run,
        ):
            for i in range(8):
                if i == 4:
                    run._resources.io[0].inject(-errno.EIO, skip=5, count=3)
                _step(model, i)
                model.zero_grad()
        assert caught.value.errno == errno.EIO
        del caught
        model.zero_grad()
        torch.cuda.synchronize()
        with memopt.optimize(model, plan="ssd", regions=["layers"], budget=budget):
            _step(model, 0)


# ---------------------------------------------------------------------------------------- bounds and ends


def test_device_and_staging_memory_are_bounded(transfers):
    """20 tensors of 8 MiB asked ahead: landings count when they begin, staging never exceeds its cap."""
    pairs = []
    for i in range(20):
        source = torch.full((8 * MIB,), i, dtype=torch.uint8, device="cuda")
        pairs.append((put(transfers, source), i))
        del source
    transfers.drain()
    transfers.finish()
    gc.collect()  # what failures before this left in their tracebacks
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for stored, _ in pairs[:4]:
        stored.prefetch()
    assert torch.cuda.memory_allocated() - before <= 4 * 8 * MIB
    for stored, value in pairs:
        result = stored.take(keep=True)
        assert int(result.min()) == int(result.max()) == value
        del result
    assert torch.cuda.max_memory_allocated() - before <= 6 * 8 * MIB
    assert transfers.spill.staging.stats().peak_mapped_bytes <= 32 * MIB
    torch.cuda.synchronize()
    transfers.poll()
    assert torch.cuda.memory_allocated() <= before


def test_close_in_mid_flight():
    with spill_directory() as path:
        with transfers_on(path) as transfers:
            sources = [torch.randn(700_000, device="cuda") for _ in range(8)]
            stored = [put(transfers, source) for source in sources]
            for item in stored[:5]:
                item.prefetch()
            for item in stored[3:]:
                item.settle()
            del stored[:3], item
        assert transfers.spill.staging.stats().mapped_bytes == 0
        for item, source in zip(stored, sources[3:], strict=True):
            assert torch.equal(item.take(keep=True), source)
        torch.cuda.synchronize()


SHUTDOWN = """
import sys
sys.path[:0] = sys.argv[1:3]
import torch
from test_chain_gpu import put, transfers_on
context = transfers_on(sys.argv[3])
transfers = context.__enter__()
stored = [put(transfers, torch.randn(700_000, device="cuda")) for _ in range(8)]
torch.cuda.synchronize()
transfers.finish()
for item in stored:
    item.prefetch()
print("leaving", flush=True)
"""


def test_the_interpreter_ends_with_everything_under_way():
    with spill_directory() as path:
        done = subprocess.run(
            [sys.executable, "-c", SHUTDOWN, str(ROOT), str(ROOT / "tests/activations"), str(path)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.stdout == "leaving\n", done.stderr
    assert done.returncode == 0, done.stderr


def test_the_fallback_is_exact_and_says_so():
    with spill_directory() as path, transfers_on(path, engine="threads") as transfers:
        assert transfers.chain is None
        assert "threads" in transfers.chain_reason
        source = torch.randn(700_001, device="cuda")
        stored = put(transfers, source)
        stored.prefetch()
        assert torch.equal(stored.take(keep=True), source)
        stored.settle()


def test_sleeping_word_is_seen():
    """A word that plain C stores wakes a stream: the order of a store and a copy behind it, 2,000 times."""
    device = torch.device("cuda", torch.cuda.current_device())
    calls, reason = open_stream_calls(device)
    assert calls is not None, reason
    words = Words(HostPool(4 * MIB, True), calls, num_words=64)
    pool = HostPool(4 * MIB, True)
    buffer = pool.take(65_536)
    target = torch.empty(65_536, dtype=torch.uint8, device=device)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for step in range(2000):
        word = words.take()
        while word is None:
            word = words.take()
        assert calls.wait_for_word(stream.cuda_stream, word.device_address) == ""
        assert calls.copy(stream.cuda_stream, target.data_ptr(), buffer.address, 65_536) == ""
        event = stream.record_event()
        ctypes.memset(buffer.address, step % 251, 65_536)
        word.set(1)
        with torch.cuda.stream(stream):
            wrong += (target != step % 251).sum()
        event.synchronize()
        words.give(word, event)
    stream.synchronize()
    assert int(wrong) == 0
    buffer.release()
    pool.close()
    words.close()


def test_large_regions_through_a_small_ring():
    """Whole programs: op outputs of several MiB, host budget so small that staging is 32 MiB."""

    def step(model, i):
        x = torch.randn(400_001, 12, generator=torch.Generator().manual_seed(i)).cuda()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Tanh() for _ in range(3))
            self.scale = nn.Parameter(torch.ones(12))

        def forward(self, x):
            x = x * self.scale
            for layer in self.layers:
                x = layer(x * self.scale)
            return x

    program = Program(build=Wide, step=step, regions=["layers"], device="cuda", num_steps=4)
    compare(plain_run(program), run_memopt(program, "ssd", strict=True))
