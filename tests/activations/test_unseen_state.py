"""Writes to buffers, weights and other tensors that PyTorch does not see: numpy, Triton kernels, `.data`.

No schema shows them and no version counts them: a recompute would start from what the forward left. The plain loop is
right in all of these programs.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _bitwise import assert_bitwise, plain_run, plan_for, run_memopt
from _traps import WIDTH, Block, batch, simple_step
from _user_program import EACH, program
from torch import Tensor

import memopt


class NumpyBuffer(Block):
    """Keeps a running mean by numpy and reads it before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("table", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) - self.mean.clone()
        mean = self.mean.numpy()
        mean[...] = np.float32(0.9) * mean + np.float32(0.1) * x.detach().mean(0).numpy()
        return x + self.b(torch.tanh(h)) * (self.mean.clone() + self.table)


def _two_forwards(model, i):
    first, second = model(batch(i)).square().mean(), model(batch(i + 9)).sin().mean()
    (first + second).backward()
    return first, second


@EACH
@pytest.mark.parametrize("step", [simple_step, _two_forwards])
def test_a_buffer_written_unseen_is_written_once(step, placement):
    """Without it: 13 of 16 gradients wrong, and every buffer, silently."""
    assert_bitwise(program(NumpyBuffer, step, num_steps=4), placement)


class NumpyWeight(Block):
    """Normalizes its weight by numpy."""

    awake = True

    def forward(self, x: Tensor) -> Tensor:
        weight = self.a.weight.detach().numpy()
        if NumpyWeight.awake:
            weight /= np.linalg.norm(weight)
        return x + self.b(torch.tanh(self.a(x)))


def _clipping(model, i):
    """Clips the weights through `.data` between forward and backward."""
    loss = model(batch(i)).square().mean()
    for parameter in model.parameters():
        parameter.data.clamp_(-0.1, 0.1)
    loss.backward()
    return loss


class Plain(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(x)))


TABLE = torch.zeros(WIDTH)


class ReadsTable(Block):
    """Reads a tensor that is no buffer; nothing saves it for backward."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(x) + TABLE))


def _rewriting(model, i):
    TABLE.data.fill_(1.0)
    loss = model(batch(i)).square().mean()
    TABLE.data.fill_(2.0)
    loss.backward()
    return loss


@pytest.mark.parametrize("placement", ["recompute", "ssd", "strict"])
@pytest.mark.parametrize(
    ("case", "match"),
    [
        (program(NumpyWeight), "wrote to a.weight in a way that"),
        (program(Plain, _clipping), "was modified in place between forward and backward"),
        (program(ReadsTable, _rewriting), "got another tensor"),
    ],
    ids=["weight in forward", "weight after forward", "tensor elsewhere"],
)
def test_what_cannot_be_repeated_is_refused_before_weights_change(case, match, placement):
    plain_run(case)
    with pytest.raises(memopt.MemoptError, match=match):
        if placement == "strict":  # also where the traced step had nothing to find
            run_memopt(_later(case), "recompute", strict=True)
        else:
            run_memopt(case, placement)


def _later(case):
    """The same program, which begins with two innocent steps."""
    plain = program(Plain)

    def step(model, i):
        NumpyWeight.awake = i >= 2
        return (case if i >= 2 else plain).step(model, i)

    return program(case.build, step, num_steps=4)


def test_buffers_that_nobody_writes_are_not_kept():
    record = run_memopt(program(NumpyBuffer), plan_for(program(NumpyBuffer), "kept"))
    assert set(record.run._engine.written_buffers) == {"layers.0", "layers.1", "layers.2"}
    for indices in record.run._engine.written_buffers.values():
        assert indices == {0}, "the table is read only"
