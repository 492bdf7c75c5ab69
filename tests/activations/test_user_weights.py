"""Weights and buffers that are not what a plain `nn.Parameter` is: made elsewhere, written or exchanged on the way."""

from __future__ import annotations

import warnings

import pytest
import torch
from _bitwise import assert_bitwise, plain_run, run_memopt, some
from _traps import ROWS, WIDTH, Block, Net, Sines, batch
from _user_program import EACH, program
from torch import Tensor, nn
from torch.nn import functional as F

import memopt

MIXED = pytest.mark.parametrize("placement", some("recompute", "mix-0"))


# ------------------------------------------------------------------------------------- tensors of inference mode
class Biased(Block):
    """Adds tables that were made in inference mode: such tensors have no version counter."""

    def __init__(self) -> None:
        super().__init__()
        with torch.inference_mode():
            self.register_buffer("table", torch.linspace(-1, 1, WIDTH))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        with torch.inference_mode():
            norm = (x * 2).abs().mean().item()
        return x + self.b(torch.sin(self.a(x) + self.table + bias)) * norm


class BiasedNet(Net):
    """Gives every block the same table."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            bias = torch.linspace(0, 1, ROWS * WIDTH).view(ROWS, WIDTH)
        h = self.inp(x)
        for layer in self.layers:
            h = layer(h, bias)
        return self.out(h)


@MIXED
@pytest.mark.parametrize("strict", [False, True])
def test_tables_made_in_inference_mode(strict, placement, monkeypatch):
    """An evaluation under inference_mode fills such caches; training with them is legal where nothing saves them."""
    monkeypatch.setattr("memopt.activations.engine.MIN_MOVE_BYTES", 1)
    assert_bitwise(program(lambda: BiasedNet(Biased)), placement, strict=strict)


# ------------------------------------------------------------------------------------------- weights of a moment
def _adapted(model: nn.Module, i: int) -> Tensor:
    """One step of MAML: the loss after a gradient step that is itself differentiated."""
    weights = dict(model.named_parameters())
    call = torch.func.functional_call
    before = call(model, weights, (batch(i),)).square().mean()
    slopes = torch.autograd.grad(before, list(weights.values()), create_graph=True)
    moved = {n: p - 0.1 * g for (n, p), g in zip(weights.items(), slopes, strict=True)}
    loss = call(model, moved, (batch(i + 9),)).square().mean()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's, about reference cycles
        loss.backward(create_graph=True)
    return loss


def _hypernetwork(model: nn.Module, i: int) -> Tensor:
    """Weights made by an op from the parameters, two sets of them before one backward."""
    losses = []
    for scale in (0.9, 1.2):
        made = {n: torch.tanh(p * scale) for n, p in model.named_parameters()}
        losses.append(torch.func.functional_call(model, made, (batch(i),)).square().mean())
    sum(losses).backward()
    return torch.stack(losses)


@EACH
@pytest.mark.parametrize("step", [_adapted, _hypernetwork])
@pytest.mark.filterwarnings("error")
def test_weights_of_a_moment(step, placement):
    """Refused before: backward found the model's own weights where functional_call had others."""
    assert_bitwise(program(Sines, step), placement)


class Normalized(Block):
    """Normalizes its weight in place whenever it trains, as EDM2 does."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.a.weight.copy_(F.normalize(self.a.weight, dim=1))
            self.b.weight.data.clamp_(-0.2, 0.2)
        return x + self.b(torch.sin(self.a(x)))


@EACH
def test_weights_that_the_forward_writes(placement):
    assert_bitwise(program(Normalized), placement)


class Exchanged(Block):
    """Gives its weight other memory in every forward: no version counter shows it."""

    def forward(self, x: Tensor) -> Tensor:
        self.a.weight.data = F.normalize(self.a.weight.data, dim=1)
        return x + self.b(torch.sin(self.a(x)))


@EACH
def test_weights_that_get_other_memory_in_the_forward_are_refused(placement):
    """Without it: normalized twice, and 13 of 16 gradients of other weights, silently."""
    plain_run(program(Exchanged))
    with pytest.raises(memopt.MemoptError, match=r"gave a\.weight other memory"):
        run_memopt(program(Exchanged), placement)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_modules_that_cannot_be_in_a_session_are_refused_at_entry():
    """Lazy weights and TorchScript failed in the first step, inside of PyTorch."""
    blocks = nn.ModuleList([nn.Sequential(nn.Tanh(), torch.jit.script(nn.Linear(2, 2)))])
    with pytest.raises(memopt.ConfigError, match=r"region '0' contains TorchScript \(Linear\)"):
        memopt.start(blocks, regions=["0"])
    with pytest.raises(memopt.ConfigError, match=r"'weight' of module 'root' has no shape yet"):
        memopt.start(nn.LazyLinear(WIDTH))


@EACH
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_beside_the_regions(placement):
    class Beside(Net):
        def __init__(self) -> None:
            super().__init__(Sines)
            self.inp = torch.jit.script(self.inp)

    assert_bitwise(program(Beside), placement)
