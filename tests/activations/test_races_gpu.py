"""Built to expose a missing synchronisation: many small transfers, little arithmetic, 50 repeats, streams held up.

A race shows only when one stream is late. So the copies are made late (side streams keep the link to the host busy in
both directions), or the kernels are (each region begins with a spin kernel), and memory that is freed is overwritten
at once with NaN by ops of the program itself. Only element-wise ops and sums are used: they repeat their bits.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading

import pytest
import torch
from _bitwise import (
    Program,
    compare,
    kept_plan,
    plain_run,
    random_plan,
    run_memopt,
    trace_of,
    train,
)
from torch import nn

import memopt
from memopt.types.plan import OpPlacement, Plan, RegionPlan

pytestmark = pytest.mark.gpu
NUM_STEPS, NUM_REGIONS, SIZE = 50, 16, 96 * 1024
SPIN_CYCLES = 400_000  # some 0.2 ms
SLOW_COMPUTE = {"on": False}


class Block(nn.Module):
    """Eight element-wise ops on 384 KiB, one of them in place over an op output that is on its way out."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(SIZE) * 0.1)

    def forward(self, x):
        if SLOW_COMPUTE["on"]:
            torch.cuda._sleep(SPIN_CYCLES)
        h = x * self.w
        h.mul_(1.25)  # copy on write: what left must be the value before
        k = torch.sin(h)
        s = torch.sigmoid(k + x)
        k = k * s
        torch.full((SIZE,), float("nan"), device=x.device)  # takes whatever block was freed last
        return x + torch.tanh(k)


class Net(nn.Module):
    """A list of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(NUM_REGIONS)])

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


PROGRAM = Program(build=Net, step=_step, regions=["layers"], device="cuda", num_steps=NUM_STEPS)


@contextlib.contextmanager
def busy_link():
    """Keep copies in both directions under way on two streams of their own."""
    size = 16 << 20
    pinned = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    device = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    stop = threading.Event()

    def copy():
        while not stop.is_set():
            for _ in range(4):
                with torch.cuda.stream(streams[0]):
                    pinned[0].copy_(device[0], non_blocking=True)
                with torch.cuda.stream(streams[1]):
                    device[1].copy_(pinned[1], non_blocking=True)
            for stream in streams:
                stream.synchronize()

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def slow_compute():
    """Let every region begin with a spin kernel."""
    SLOW_COMPUTE["on"] = True
    try:
        yield
    finally:
        SLOW_COMPUTE["on"] = False


STRESSES = {"calm": contextlib.nullcontext, "late copies": busy_link, "late kernels": slow_compute}


def host_plan(trace, *, window_bytes=1 << 30, prefetch_bytes=4 << 30):
    """Every placeable op output, every input and what is saved outside: on the host."""
    return Plan(
        regions=tuple(
            RegionPlan(
                name=region.name,
                input="host",
                ops=tuple(
                    OpPlacement(position=op.position, op=op.op, placement="host", nbytes=op.nbytes)
                    for op in region.ops
                    if op.placeable
                ),
            )
            for region in trace.regions
        ),
        outside="host",
        window_bytes=window_bytes,
        prefetch_bytes=prefetch_bytes,
    )


def test_the_plain_loop_repeats_itself():
    """Or nothing below means anything."""
    again = train(PROGRAM, lambda model, optimizer: contextlib.nullcontext())
    compare(plain_run(PROGRAM), again)


@pytest.mark.parametrize("stress", STRESSES)
@pytest.mark.parametrize("window_bytes", [1 << 10, 1 << 30])
@pytest.mark.parametrize("prefetch_bytes", [1, 1 << 30])
def test_everything_on_the_host(stress, window_bytes, prefetch_bytes):
    plan = host_plan(trace_of(PROGRAM), window_bytes=window_bytes, prefetch_bytes=prefetch_bytes)
    with STRESSES[stress]():
        record = run_memopt(PROGRAM, plan)
    compare(plain_run(PROGRAM), record)
    moved = record.run.report().to_dict()["measured"]
    assert moved["host_bytes"] >= NUM_REGIONS * SIZE * 4, "the plan moved next to nothing"


@pytest.mark.parametrize("stress", ["late copies", "late kernels"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_mixes(stress, seed):
    plan = random_plan(trace_of(PROGRAM), seed, ("device", "host", "recompute"))
    with STRESSES[stress]():
        compare(plain_run(PROGRAM), run_memopt(PROGRAM, plan))


def test_kept_on_the_device_under_late_kernels():
    with slow_compute():
        compare(plain_run(PROGRAM), run_memopt(PROGRAM, kept_plan(trace_of(PROGRAM))))


@pytest.mark.parametrize("where", ["ssd", "host"])
def test_spill_under_late_copies(where):
    plan = random_plan(trace_of(PROGRAM), 3, ("device", where))
    with busy_link():
        compare(plain_run(PROGRAM), run_memopt(PROGRAM, plan))


@pytest.mark.parametrize("stress", ["late copies", "late kernels"])
def test_on_the_users_own_stream(stress):
    """Streams are looked up when used: forward on one side stream, backward called under another, steps alternate."""
    streams = []

    def step(model, i):
        if not streams:
            streams.extend(torch.cuda.Stream() for _ in range(2))
        x = torch.randn(SIZE, generator=torch.Generator().manual_seed(i)).cuda()
        stream = streams[i % 2]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = model(x).square().mean()
            loss.backward()
        x.record_stream(stream)
        torch.cuda.current_stream().wait_stream(stream)
        return loss

    program = Program(build=Net, step=step, regions=["layers"], device="cuda", num_steps=20)
    # the steps alternate on purpose, and the losses that are kept for the comparison keep graphs' nodes
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    try:
        nothing = lambda model, optimizer: contextlib.nullcontext()  # noqa: E731
        compare(plain_run(program), train(program, nothing))
        with STRESSES[stress]():
            compare(plain_run(program), run_memopt(program, host_plan(trace_of(PROGRAM))))
    finally:
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(True)


def test_backward_in_another_thread():
    """CUDA runs backward in autograd's thread anyway; here the caller is another one too."""

    def step(model, i):
        x = torch.randn(SIZE, generator=torch.Generator().manual_seed(i)).cuda()
        loss = model(x).square().mean()
        errors = []

        def backward():
            try:
                loss.backward()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
        torch.cuda.synchronize()
        if errors:
            raise errors[0]
        return loss

    program = Program(build=Net, step=step, regions=["layers"], device="cuda", num_steps=20)
    with busy_link():
        compare(plain_run(program), run_memopt(program, host_plan(trace_of(PROGRAM))))


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_an_exception_while_transfers_fly(when):
    """The graph dies with copies under way; the steps after it repeat the plain loop."""

    class Trip(Exception):
        pass

    def step(model, i):
        if i % 5 == 3 and guarded:
            x = torch.randn(SIZE, generator=torch.Generator().manual_seed(i)).cuda()
            state = torch.cuda.get_rng_state()
            with contextlib.suppress(Trip):
                if when == "forward":
                    handle = model.layers[NUM_REGIONS // 2].register_forward_pre_hook(
                        functools.partial(_raise, Trip)
                    )
                    try:
                        model(x)
                    finally:
                        handle.remove()
                else:
                    loss = model(x).square().mean()
                    handle = model.layers[3].w.register_hook(functools.partial(_raise, Trip))
                    try:
                        loss.backward()
                    finally:
                        handle.remove()
            loss = None
            model.zero_grad()
            torch.cuda.set_rng_state(state)
        return _step(model, i)

    program = Program(build=Net, step=step, regions=["layers"], device="cuda", num_steps=20)
    guarded = False
    plain = plain_run(program)
    guarded = True
    with busy_link():
        record = run_memopt(program, host_plan(trace_of(PROGRAM)))
    for p, o in zip(plain.steps, record.steps, strict=True):
        assert torch.equal(p.outputs["out"], o.outputs["out"])
    compare(plain, record)


def _raise(kind, *_):
    raise kind


def test_nothing_is_left_on_the_card_or_in_host_memory():
    trace_of(PROGRAM)  # kept for the other tests
    gc.collect()  # what failed tests left in their tracebacks
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    record = run_memopt(PROGRAM, host_plan(trace_of(PROGRAM)), num_steps=5)
    del record
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
    model = Net().cuda()
    with memopt.optimize(model, plan="host", regions=["layers"]) as run:
        for i in range(30):
            _step(model, i)
            model.zero_grad()
            if i in (9, 29):
                torch.cuda.synchronize()
                level = (
                    torch.cuda.memory_allocated(),
                    run.report().to_dict()["measured"]["host_bytes"],
                )
                if i == 9:
                    first = level
        assert level[0] <= first[0] + (1 << 20)
        assert level[1] <= first[1]
