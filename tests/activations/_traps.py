"""Small programs that break a two-mode engine which lacks one of its rules; all legal in the plain loop.

`TRAPS` maps "rule-name" to a program whose plain loop must be repeated bit by bit. `test_traps_can_fail.py` shows that
each of them does fail under the engine without rules; the `test_traps_*.py` files run them under memopt.
Rule 1's programs are in `_trap_base.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from _bitwise import Program
from _trap_base import (
    INNOCENT,
    ROWS,
    TRAPS,
    WIDTH,
    Block,
    InPlace,
    Net,
    Sines,
    batch,
    simple_step,
    trap,
    two_traced_steps,
)
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "INNOCENT",
    "ROWS",
    "TRAPS",
    "WIDTH",
    "Block",
    "Net",
    "Sines",
    "batch",
    "simple_step",
    "two_traced_steps",
]


# --------------------------------------------------------------------------------------------- rule 2: generators
class NativeDropout(Block):
    """Two fused dropouts, what `F.dropout` is on CUDA."""

    def forward(self, x: Tensor) -> Tensor:
        h, _ = torch.native_dropout(self.a(x), 0.3, True)
        k, _ = torch.native_dropout(torch.tanh(self.b(h)), 0.3, True)
        return x + k


class RandLike(Block):
    """Functional random ops of several kinds."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * torch.rand_like(x)
        h = h + 0.1 * torch.randn(ROWS, WIDTH)
        keep = torch.bernoulli(torch.full_like(h, 0.7))
        order = torch.randperm(ROWS)
        return x + self.b(torch.tanh(h * keep)[order]) + torch.normal(0.0, 0.1, (ROWS, WIDTH))


class AttentionDropout(Block):
    """Scaled dot product attention with dropout, once by hand and once through SDPA's math path."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.view(1, 2, ROWS, WIDTH // 2) for t in (self.a(x), self.b(x), x))
        scores, _ = torch.native_dropout((q @ k.transpose(-1, -2)).softmax(-1), 0.2, True)
        h = F.scaled_dot_product_attention(q, k, v, dropout_p=0.2)
        return x + torch.tanh(h + scores @ v).view(ROWS, WIDTH)


class RandomBranch(Block):
    """Stochastic depth: which ops run is drawn from torch's generator."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.rand(()).item() < 0.5:
            return x + torch.tanh(self.a(x))
        h, _ = torch.native_dropout(torch.sin(self.a(x)), 0.5, True)
        return x + self.b(h)


class OwnGenerator(Block):
    """Draws from a generator of its own, which PyTorch's checkpoint does not restore."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=self.generator)
        h = self.a(x) * noise
        return x + self.b(torch.tanh(h)) * torch.rand(x.shape, generator=self.generator)


trap("2-native-dropout", NativeDropout)
trap("2-rand-like", RandLike)
trap("2-attention-dropout", AttentionDropout)
trap("2-random-branch", RandomBranch, num_steps=4)


# -------------------------------------------------------------------------------------- rule 3: side effects once
class ConvBn(nn.Module):
    """Convolution, batch norm, in-place ReLU; `momentum=None` averages by the number of batches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 3, 3, padding=1)
        self.bn = nn.BatchNorm1d(3)
        self.average = nn.BatchNorm1d(WIDTH, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn(self.conv(x[:, None])), inplace=True)
        return x + self.average(h.sum(1))


class SpectralNorm(nn.Module):
    """Both spectral norms: buffers of a power iteration are written in forward, and forward reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.old = torch.nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.new = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.new(torch.tanh(self.old(x)))


class RunningScale(Block):
    """Reads a buffer, then updates it in place; the second read sees the update."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * self.scale.clone()
        with torch.no_grad():
            self.scale.mul_(0.9).add_(h.abs().mean(0), alpha=0.1)
            self.count += 1
        return x + self.b(torch.tanh(h * self.scale.clone())) / self.count.clone()


class ReboundBuffer(Block):
    """Updates a buffer by assigning a new tensor: no write that a schema declares."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * self.scale
        self.scale = 0.9 * self.scale + 0.1 * h.detach().abs().mean(0)
        return x + self.b(torch.tanh(h * self.scale))


def two_forwards_step(model: nn.Module, i: int) -> Any:
    """Two forwards before one backward, then a third with its own backward."""
    first, second = model(batch(i)), model(batch(i + 100))
    loss = first.square().mean() + second.sin().mean()
    loss.backward()
    third = model(batch(i + 200)).cos().mean()
    third.backward()
    return loss, third


def crossed_backward_step(model: nn.Module, i: int) -> Any:
    """Two forwards, and their backwards in the order of the forwards (not the reverse)."""
    first, second = model(batch(i)).square().mean(), model(batch(i + 100)).sin().mean()
    first.backward()
    second.backward()
    return first, second


trap("3-conv-bn", ConvBn)
trap("3-spectral-norm", SpectralNorm)
trap("3-running-scale", RunningScale)
for _name, _step in (("two-forwards", two_forwards_step), ("crossed", crossed_backward_step)):
    trap(f"3-conv-bn-{_name}", ConvBn, _step)
    trap(f"3-spectral-norm-{_name}", SpectralNorm, _step)
    trap(f"3-running-scale-{_name}", RunningScale, _step)


# ------------------------------------------------------------------------------------------------ rule 4: autocast
class SharedTwice(Block):
    """One linear layer used twice: under autocast its weight is cast once, in whichever use comes first."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(torch.tanh(self.b(torch.sin(self.a(x)))))


def autocast_step(model: nn.Module, i: int) -> Any:
    """Two forwards in one autocast block, backward outside."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch(i)).float().square().mean() + model(batch(i + 9)).float().sin().mean()
    loss.backward()
    return loss


def autocast_backward_inside_step(model: nn.Module, i: int) -> Any:
    """Forward and backward twice inside one autocast block."""
    losses = []
    with torch.autocast("cpu", torch.bfloat16):
        for k in range(2):
            losses.append(model(batch(i + k)).float().square().mean())
            losses[-1].backward()
    return losses


def autocast_evaluation_first_step(model: nn.Module, i: int) -> Any:
    """An evaluation without gradients fills (or does not fill) autocast's cache before the training forward."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            before = model(batch(i))
        loss = model(batch(i)).float().square().mean()
    loss.backward()
    return before, loss


class TiedNet(Net):
    """A block's weight is also used outside, before the blocks: its cast is in the cache when they start."""

    def forward(self, x: Tensor) -> Tensor:
        """Return two values a row."""
        return super().forward(F.linear(x, self.layers[1].a.weight))


trap("4-layer-twice", SharedTwice, autocast_step)
trap("4-two-forwards", InPlace, autocast_step)
trap("4-backward-inside", SharedTwice, autocast_backward_inside_step)
trap("4-evaluation-first", SharedTwice, autocast_evaluation_first_step)
TRAPS["4-tied-outside"] = Program(
    build=functools.partial(TiedNet, SharedTwice), step=autocast_step, regions=["layers"]
)


# ------------------------------------------------------------------------------------------ rule 6: unseen writers
class _NumpyFill(torch.autograd.Function):
    """Adds into a factory's output from numpy, as a split-K kernel does; the dispatcher sees the factory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        out = torch.zeros_like(x)
        np.add(
            out.detach().numpy(), np.float32(1.25) * x.detach().numpy(), out=out.detach().numpy()
        )
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * 1.25 + 0.0 * x


class _NumpyOverwrite(torch.autograd.Function):
    """Fills an `empty_like` from numpy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        np.negative(x.detach().numpy(), out=out.detach().numpy())
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


class _NumpyInPlace(torch.autograd.Function):
    """Scales its argument in place from numpy and bumps no version, as Liger's rope kernel does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.detach().numpy()[...] *= np.float32(0.75)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 0.75


class UnseenFill(Block):
    """Factories' outputs are filled by numpy, once over zeros and once over whatever was there."""

    def forward(self, x: Tensor) -> Tensor:
        h = _NumpyFill.apply(self.a(x))
        return x + self.b(_NumpyOverwrite.apply(torch.sin(h)))


class UnseenInPlace(Block):
    """An op's output is rotated in place by numpy, and what comes after depends on the new values."""

    def forward(self, x: Tensor) -> Tensor:
        h = _NumpyInPlace.apply(self.a(x))
        return x + self.b(torch.sin(h))


class UnseenInput(Block):
    """The region's own input is written by numpy; nothing outside needs its old value."""

    def forward(self, x: Tensor) -> Tensor:
        return (
            torch.tanh(self.b(_NumpyInPlace.apply(x))) + 1.0
        )  # an add, so that backward needs no output


trap("6-fill", UnseenFill)
trap("6-in-place", UnseenInPlace)


# ------------------------------------------------------------------------------------- rule 7: returned and changed
class ReturnsInner(Block):
    """Returns an inner op's output beside its result; autograd does not need that output."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u = self.a(x)
        return x + self.b(torch.tanh(u)), u


class ZeroingNet(Net):
    """The caller zeroes what each region returned beside its result, in one of several legal ways."""

    way = "zero_"

    def forward(self, x: Tensor) -> Tensor:
        """Return two values a row."""
        h = self.inp(x)
        for layer in self.layers:
            h, u = layer(h)
            if self.way == "zero_":
                u.zero_()
            elif self.way == "view":
                u.view(-1)[5] = 7.0
            elif self.way == "detach":
                u.detach().mul_(0.0)
            else:
                u.data.zero_()
        return self.out(h)


def zeroing_program(way: str) -> Program:
    """The program of `ZeroingNet` for one way of writing."""

    def build() -> nn.Module:
        net = ZeroingNet(ReturnsInner)
        net.way = way
        return net

    return Program(build=build, step=simple_step, regions=["layers"])


ZEROING = {way: zeroing_program(way) for way in ("zero_", "view", "detach", "data")}
TRAPS["7-zeroed-by-caller"] = ZEROING["zero_"]


# ----------------------------------------------------------------------------------------- rule 9: nested backward
class EnergyBlock(Block):
    """The gradient of an energy inside forward; its graph is part of the outer one."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            energy = self.b(torch.tanh(self.a(x))).square().sum()
            (slope,) = torch.autograd.grad(energy, x, create_graph=True)
        return x - 0.1 * slope + torch.sin(self.a(x))


class NestedFirstOrder(Block):
    """A gradient without its graph, of a detached input, used as a constant."""

    def forward(self, x: Tensor) -> Tensor:
        probe = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(torch.sin(self.a(probe)).sum(), probe)
        return x + torch.tanh(self.b(x)) * slope


trap("9-energy", EnergyBlock)
trap("9-first-order", NestedFirstOrder)
trap("9-energy-crossed", EnergyBlock, crossed_backward_step)


# ------------------------------------------------------------------------------------------------ rule 12: graphs
def retain_step(model: nn.Module, i: int) -> Any:
    """Three backwards through one graph, the last of them freeing it."""
    loss = model(batch(i)).square().mean()
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    return loss


def penalty_step(model: nn.Module, i: int) -> Any:
    """A gradient penalty: backward through the backward."""
    x = batch(i).requires_grad_()
    loss = model(x).square().mean()
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + slope.square().sum()).backward()
    return loss, slope, x.grad


def partial_step(model: nn.Module, i: int) -> Any:
    """Backward to one weight only, then the full backward."""
    loss = model(batch(i)).square().mean()
    (slope,) = torch.autograd.grad(loss, model.layers[1].a.weight, retain_graph=True)
    loss.backward()
    return loss, slope


trap("12-retain-in-place", InPlace, retain_step)
trap("12-retain-dropout", NativeDropout, retain_step)
trap("12-retain-buffers", RunningScale, retain_step)
trap("12-penalty", SharedTwice, penalty_step)
trap("12-partial", RunningScale, partial_step)
