"""The bytes of every phase of a step, derived term by term.

The model is `NUM_BLOCKS` blocks x + b(gelu(a(x))) without biases on `TOKENS` rows: a widens HIDDEN to INNER, b narrows.
With X = bytes of a block's input or output, Y = of a's and of gelu's output, W = of one weight or its gradient:

- plain, after forward: each block keeps x (X), a's output (Y, gelu's backward) and gelu's output (Y, b's weight
  gradient); the loss keeps the last output (X). The first x is the batch, which stands anyway.
- everything recomputed, after forward: the blocks' inputs and the last output.
- while block i is run backward: the inputs of blocks 1..i, the gradient that comes in (X), a's and gelu's outputs
  (2 Y) and the gradient of gelu's output (Y), the first weight gradient (W), and two weight gradients of each block
  behind it. b's output is not made again: checkpointing stops before the region's last product.

SLACK_BYTES per block is what does not scale with the tokens: generator states (5 KiB on CPU), scalars, rounding.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import pytest
import torch
from _bitwise import spill_directory
from _memory import LiveBytes, settle
from torch import nn
from torch.nn import functional as F

import memopt
from memopt.types.plan import OpPlacement, Plan, RegionPlan

NUM_BLOCKS, TOKENS, HIDDEN, INNER = 5, 1024, 32, 128
X, Y, W = TOKENS * HIDDEN * 4, TOKENS * INNER * 4, HIDDEN * INNER * 4
SLACK_BYTES = 16 << 10  # per block


class Block(nn.Module):
    """x + b(gelu(a(x)))."""

    def __init__(self, scale: int = 1) -> None:
        super().__init__()
        self.a = nn.Linear(HIDDEN * scale, INNER * scale, bias=False)
        self.b = nn.Linear(INNER * scale, HIDDEN * scale, bias=False)

    def forward(self, x):
        return x + self.b(F.gelu(self.a(x)))


class Net(nn.Module):
    """Blocks in a list."""

    def __init__(self, scale: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(scale) for _ in range(NUM_BLOCKS)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@dataclass(frozen=True, kw_only=True)
class Phases:
    """Bytes above what stands (weights, batch) in the second step under a plan."""

    after_forward: int
    forward_peak: int
    backward_peak: int
    after_backward: int
    after_clearing: int
    ssd: int = 0
    host: int = 0


def one_step(model, x, meter):
    """Run one step, read the meter at each boundary."""
    settle()
    base = meter.current_bytes
    meter.reset_peak()
    loss = model(x).square().mean()
    settle()
    after_forward, forward_peak = meter.current_bytes - base, meter.peak_bytes - base
    meter.reset_peak()
    loss.backward()
    settle()
    backward_peak = meter.peak_bytes - base
    del loss
    after_backward = meter.current_bytes - base
    model.zero_grad()
    settle()
    return Phases(
        after_forward=after_forward,
        forward_peak=forward_peak,
        backward_peak=backward_peak,
        after_backward=after_backward,
        after_clearing=meter.current_bytes - base,
    )


def plan_of(trace, placements, *, given="device", window_bytes=1 << 30, prefetch_bytes=1 << 30):
    """A plan by the place of an op among those that allocate: 0 a's product, 1 gelu, 2 b's product, 3 the sum."""
    return Plan(
        regions=tuple(
            RegionPlan(
                name=region.name,
                input=given,
                ops=tuple(
                    OpPlacement(
                        position=region.ops[k].position,
                        op=region.ops[k].op,
                        placement=where,
                        nbytes=region.ops[k].nbytes,
                    )
                    for k, where in placements.items()
                ),
            )
            for region in trace.regions
        ),
        window_bytes=window_bytes,
        prefetch_bytes=prefetch_bytes,
    )


def measured(placements, meter_class, **options):
    """Trace the model, put the plan in force, measure one step under it; None: the plain step."""
    torch.manual_seed(0)
    with spill_directory() as path, meter_class() as meter:
        model, x = Net(), torch.randn(TOKENS, HIDDEN)
        if placements is None:
            one_step(model, x, meter)
            return one_step(model, x, meter)
        budget = memopt.Budget(ssd=f"{path}:64MiB")
        with memopt.optimize(model, plan="recompute", budget=budget) as run:
            one_step(model, x, meter)
            one_step(model, x, meter)  # a step without an optimizer ends at the next forward
            trace = run.trace
        names = [op.op for op in trace.regions[0].ops]
        assert [name.split(".")[1] for name in names] == ["mm", "gelu", "mm", "add"], names
        assert [op.nbytes for op in trace.regions[0].ops] == [Y, Y, X, X]
        with memopt.optimize(
            model, plan=plan_of(trace, placements, **options), budget=budget
        ) as run:
            for _ in range(3):
                phases = one_step(model, x, meter)
            assert run.plan.regions[0].ops or not placements
        report = run.report().to_dict()["measured"]
        return Phases(
            **{**phases.__dict__, "ssd": report["ssd_bytes"], "host": report["host_bytes"]}
        )


@pytest.fixture(params=["memopt", "independent"])
def meter_class(request):
    """memopt's own accounting, and one written for these tests alone: they must agree with the derivation."""
    if request.param == "independent":
        return LiveBytes
    from memopt.memory.accounting import AccountedMemory

    return AccountedMemory


def close(found, expected, what, slack=NUM_BLOCKS * SLACK_BYTES):
    """Equal up to the slack, both ways: too few bytes mean that the meter is blind."""
    assert abs(found - expected) <= slack, (
        f"{what}: {found:,} bytes, expected {expected:,} +- {slack:,} (X={X:,} Y={Y:,} W={W:,}): "
        f"off by {(found - expected) / X:+.2f} X"
    )


def backward_peak(stored_per_block, block_bytes, prefetched=0):
    """Largest level in backward.

    Args:
        stored_per_block: bytes that wait on the device for each block beside its input.
        block_bytes: what block i's own backward needs at its largest moment beside its input.
        prefetched: bytes fetched for the block before it meanwhile.
    """
    levels = []
    for i in range(NUM_BLOCKS):
        behind = NUM_BLOCKS - 1 - i
        ahead = i * (X + stored_per_block) + (prefetched if i else 0)
        levels.append(ahead + X + block_bytes + (2 * behind + 1) * W)
    return max(levels)


def test_plain(meter_class):
    phases = measured(None, meter_class)
    close(phases.after_forward, NUM_BLOCKS * (X + 2 * Y), "after forward")
    close(phases.backward_peak, backward_peak(2 * Y, 3 * Y), "backward peak")
    close(phases.after_backward, NUM_BLOCKS * 2 * W, "gradients")
    assert phases.after_clearing <= SLACK_BYTES


def test_everything_recomputed(meter_class):
    phases = measured({}, meter_class)
    close(phases.after_forward, NUM_BLOCKS * X, "after forward")
    close(phases.forward_peak, (NUM_BLOCKS - 1) * X + 2 * Y, "forward peak")
    close(phases.backward_peak, backward_peak(0, 3 * Y), "backward peak")
    close(phases.after_backward, NUM_BLOCKS * 2 * W, "gradients")
    assert phases.after_clearing <= SLACK_BYTES
    assert phases.ssd in (0, NUM_BLOCKS * X)  # the traced step moves the inputs out where it can


def test_one_product_kept_on_the_device(meter_class):
    """a's output stays; gelu's is made again: one Y a block stands through the forward."""
    phases = measured({0: "device"}, meter_class)
    close(phases.after_forward, NUM_BLOCKS * (X + Y), "after forward")
    close(phases.backward_peak, backward_peak(Y, 3 * Y), "backward peak")
    assert phases.after_clearing <= SLACK_BYTES


def test_everything_kept_costs_what_the_plain_step_costs(meter_class):
    """The engine keeps aliases: no byte more than autograd itself keeps."""
    phases = measured({0: "device", 1: "device"}, meter_class)
    close(phases.after_forward, NUM_BLOCKS * (X + 2 * Y), "after forward")
    close(phases.backward_peak, backward_peak(2 * Y, 3 * Y), "backward peak")


def test_one_product_on_ssd(meter_class):
    """a's output leaves the device in forward and is back for its own block and the one before it in backward."""
    phases = measured({0: "ssd"}, meter_class)
    close(phases.after_forward, NUM_BLOCKS * X, "after forward")
    close(phases.forward_peak, (NUM_BLOCKS - 1) * X + 2 * Y, "forward peak")
    bound = backward_peak(0, 3 * Y, prefetched=Y) + NUM_BLOCKS * SLACK_BYTES
    assert backward_peak(0, 3 * Y) - NUM_BLOCKS * SLACK_BYTES <= phases.backward_peak <= bound
    close(phases.ssd, NUM_BLOCKS * Y, "bytes on SSD")
    assert phases.after_clearing <= SLACK_BYTES


def test_two_outputs_on_ssd_with_a_small_fetch_window(meter_class):
    """With prefetch_bytes of one byte at most one tensor more than the block's own is on its way back."""
    phases = measured({0: "ssd", 1: "ssd"}, meter_class, prefetch_bytes=1)
    close(phases.after_forward, NUM_BLOCKS * X, "after forward")
    close(phases.ssd, NUM_BLOCKS * 2 * Y, "bytes on SSD")
    bound = backward_peak(0, 3 * Y, prefetched=Y) + NUM_BLOCKS * SLACK_BYTES
    assert phases.backward_peak <= bound, (
        f"{(phases.backward_peak - bound) / Y:+.2f} Y above the bound"
    )


def test_inputs_on_ssd(meter_class):
    """Of the activations only the last output, which the loss keeps, is left after forward."""
    phases = measured({}, meter_class, given="ssd")
    close(phases.after_forward, X, "after forward")
    close(phases.forward_peak, X + 2 * Y, "forward peak", slack=X + NUM_BLOCKS * SLACK_BYTES)
    assert (NUM_BLOCKS - 1) * X <= phases.ssd <= NUM_BLOCKS * X + NUM_BLOCKS * 4096
    # block i lands its own input; the one before it may be on its way
    expected = 2 * X + X + 3 * Y + (2 * (NUM_BLOCKS - 1) + 1) * W
    assert phases.backward_peak <= expected + NUM_BLOCKS * SLACK_BYTES


def test_memopts_accounting_agrees_with_an_independent_count():
    from memopt.memory.accounting import AccountedMemory

    def work(meter):
        levels = []
        model, x = Net(), torch.randn(TOKENS, HIDDEN)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        for _ in range(2):
            loss = model(x.view(TOKENS, HIDDEN)).square().mean()
            levels.append(meter.current_bytes)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            levels += [meter.current_bytes, meter.peak_bytes]
            meter.reset_peak()
        return levels

    results = []
    for meter_class in (AccountedMemory, LiveBytes):
        with meter_class() as meter:
            results.append(work(meter))
    differences = [abs(a - b) for a, b in zip(*results, strict=True)]
    assert max(differences) <= 4096, results


# ------------------------------------------------------------------------------------------------------------- CUDA
class CudaBytes(contextlib.AbstractContextManager):
    """The same readings from PyTorch's allocator."""

    def __exit__(self, *exc):
        return None

    @property
    def current_bytes(self):
        return torch.cuda.memory_allocated()

    @property
    def peak_bytes(self):
        return torch.cuda.max_memory_allocated()

    def reset_peak(self):
        torch.cuda.reset_peak_memory_stats()


SCALE = 16  # hidden 512, inner 2048 on 4,096 rows: X = 8 MiB, Y = 32 MiB


def measured_on_cuda(placements, **options):
    """As `measured`, on CUDA."""
    torch.manual_seed(0)
    meter = CudaBytes()
    model, x = Net(SCALE).cuda(), torch.randn(4 * TOKENS, HIDDEN * SCALE, device="cuda")
    one_step(model, x, meter)  # cuBLAS takes its workspace
    if placements is None:
        return one_step(model, x, meter)
    with memopt.optimize(model, plan="recompute") as run:
        one_step(model, x, meter)
        one_step(model, x, meter)
        trace = run.trace
    with memopt.optimize(model, plan=plan_of(trace, placements, **options)) as run:
        for _ in range(3):
            phases = one_step(model, x, meter)
    report = run.report().to_dict()["measured"]
    return Phases(**{**phases.__dict__, "ssd": report["ssd_bytes"], "host": report["host_bytes"]})


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["plain", "recompute", "device", "host"])
def test_cuda_phases(where, monkeypatch):
    """The same terms on CUDA; a transfer window of one Y may add Y after forward, a prefetch one Y in backward."""
    for name, value in (("X", 4 * SCALE * X), ("Y", 4 * SCALE * Y), ("W", SCALE * SCALE * W)):
        monkeypatch.setitem(globals(), name, value)
    placements = {"plain": None, "recompute": {}, "device": {0: "device"}, "host": {0: "host"}}[
        where
    ]
    phases = measured_on_cuda(
        placements, **({} if placements is None else {"window_bytes": Y, "prefetch_bytes": Y})
    )
    stored = {"plain": 2 * Y, "recompute": 0, "device": Y, "host": 0}[where]
    slack = NUM_BLOCKS * (1 << 20)
    flying = Y if where == "host" else 0
    low, high = NUM_BLOCKS * (X + stored) - slack, NUM_BLOCKS * (X + stored) + flying + slack
    assert low <= phases.after_forward <= high, f"after forward {phases.after_forward / X:.2f} X"
    peak = backward_peak(stored, 3 * Y)
    assert peak - slack <= phases.backward_peak <= peak + flying + slack, (
        f"{phases.backward_peak / X:.2f} X"
    )
    assert phases.after_clearing <= slack
    if where == "host":
        # blocks of the traced step, which moves the inputs, may still be in the pool
        assert NUM_BLOCKS * Y <= phases.host <= NUM_BLOCKS * (X + Y) + 2 * Y + slack
