"""Programs that checkpoint their blocks themselves: taken over, or left alone and told; no block runs three times."""

from __future__ import annotations

import os
import tempfile
from typing import IO

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

import memopt

WIDTH, NUM_BLOCKS, NUM_STEPS = 32, 4, 3
IMPL = {True: CheckpointImpl.REENTRANT, False: CheckpointImpl.NO_REENTRANT}


class Block(nn.Module):
    """Writes a byte to a file in each forward: state that a recomputation cannot put back."""

    def __init__(self, calls: IO[bytes]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.fileno = calls.fileno()

    def forward(self, x):
        os.write(self.fileno, b"x")
        hidden = nn.functional.dropout(nn.functional.gelu(self.up(x)), 0.1, self.training)
        return x + self.down(hidden)


class Net(nn.Module):
    def __init__(self, calls: IO[bytes], call) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(calls) for _ in range(NUM_BLOCKS))
        self.call = call

    def forward(self, x):
        for layer in self.layers:
            x = self.call(layer, x)
        return x


def plainly(layer, x):
    return layer(x)


def build(calls: IO[bytes], kind: str, *, reentrant: bool) -> Net:
    if kind == "around":
        return Net(calls, lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant))
    model = Net(calls, plainly)
    if kind == "wrapper":
        for i, layer in enumerate(model.layers):
            model.layers[i] = checkpoint_wrapper(layer, checkpoint_impl=IMPL[reentrant])
    return model


def train(kind: str, *, reentrant: bool, plan: str | None):
    """Return losses and gradients, how often blocks ran in each step, and the report."""
    seen: list[torch.Tensor] = []
    counts: list[int] = []
    with tempfile.TemporaryFile(buffering=0) as calls:
        model = build(calls, kind, reentrant=reentrant)

        def loop() -> None:
            torch.manual_seed(1)
            for _ in range(NUM_STEPS):
                before = calls.seek(0, 2)
                loss = model(torch.randn(64, WIDTH).requires_grad_()).square().mean()
                loss.backward()
                counts.append(calls.seek(0, 2) - before)
                seen.extend([loss.detach(), *(p.grad.clone() for p in model.parameters())])
                model.zero_grad()

        if plan is None:
            loop()
            return seen, counts, None
        before = [dict(m.__dict__) for m in model.modules()]
        with memopt.optimize(model, plan=plan) as run:
            loop()
        after = [dict(m.__dict__) for m in model.modules()]
        for old, new in zip(before, after, strict=True):
            assert old.keys() == new.keys()
            assert all(old[key] is new[key] for key in ("checkpoint_fn",) if key in old)
        return seen, counts, run.report()


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("plan", ["recompute", "device"])
def test_wrapped_blocks_are_taken_over(plan, reentrant):
    plain, counts, _ = train("wrapper", reentrant=reentrant, plan=None)
    assert counts == [2 * NUM_BLOCKS] * NUM_STEPS
    seen, counts, report = train("wrapper", reentrant=reentrant, plan=plan)
    assert same(seen, plain)
    again = 2 if plan == "recompute" else 1
    assert counts == [2 * NUM_BLOCKS] + [again * NUM_BLOCKS] * (NUM_STEPS - 1)
    assert "gradient checkpointing was on (4 modules)" in "".join(report.notes)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("plan", ["recompute", "device", "auto"])
def test_blocks_called_inside_a_checkpoint_are_left_to_it(plan, reentrant):
    plain, counts, _ = train("around", reentrant=reentrant, plan=None)
    assert counts == [2 * NUM_BLOCKS] * NUM_STEPS
    seen, counts, report = train("around", reentrant=reentrant, plan=plan)
    assert same(seen, plain)
    assert counts == [2 * NUM_BLOCKS] * NUM_STEPS, "each block runs again once"
    assert "call them without it while the context is open" in "".join(report.notes)


def test_a_checkpoint_inside_of_a_block_is_the_blocks_own():
    class Inner(Block):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    with tempfile.TemporaryFile(buffering=0) as calls:
        torch.manual_seed(0)
        model = nn.ModuleDict({"layers": nn.ModuleList(Inner(calls) for _ in range(NUM_BLOCKS))})

        def forward(x):
            for layer in model["layers"]:
                x = layer(x)
            return x

        model.forward = forward
        with memopt.optimize(model, plan="recompute") as run:
            for _ in range(NUM_STEPS):
                model(torch.randn(64, WIDTH)).square().mean().backward()
        assert run.trace is not None
        assert len(run.trace.regions) == NUM_BLOCKS
        assert not any("call them without it" in note for note in run.report().notes)
