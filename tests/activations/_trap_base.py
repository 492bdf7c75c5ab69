"""The net that the trap programs train, and the programs of rule 1: writes over placed op outputs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from _bitwise import Program
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 12
ROWS = 8
TRAPS: dict[str, Program] = {}


class Net(nn.Module):
    """A linear layer, three blocks of one class in `layers`, a linear layer."""

    def __init__(self, block: Callable[[], nn.Module], num_blocks: int = 3) -> None:
        super().__init__()
        self.inp = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList([block() for _ in range(num_blocks)])
        self.out = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return two values a row."""
        h = self.inp(x)
        for layer in self.layers:
            h = layer(h)
        return self.out(h)


def batch(step: int, *shape: int) -> Tensor:
    """Random numbers of one step, (ROWS, WIDTH) unless told."""
    return torch.randn(
        *(shape or (ROWS, WIDTH)), generator=torch.Generator().manual_seed(77 + step)
    )


def simple_step(model: nn.Module, i: int) -> Any:
    """One forward and backward."""
    out = model(batch(i))
    loss = out.square().mean()
    loss.backward()
    return loss, out


def trap(
    name: str,
    block: Callable[[], nn.Module],
    step: Callable[[nn.Module, int], Any] = simple_step,
    **options: Any,
) -> Program:
    """Register a program over `Net(block)`."""
    program = Program(build=functools.partial(Net, block), step=step, regions=["layers"], **options)
    TRAPS[name] = program
    return program


class Block(nn.Module):
    """Two linear layers, for subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.b = nn.Linear(WIDTH, WIDTH)


class Innocent(Block):
    """Needs no rule."""

    def forward(self, x: Tensor) -> Tensor:
        h, k = torch.tanh(self.a(x)).chunk(2, dim=-1)
        return x + self.b(torch.cat([k, h], dim=-1).t().contiguous().t())


class Sines(Block):
    """`sin` occurs in forward only: its backward is `cos`."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.sin(self.a(torch.sin(x))))


def two_traced_steps(model: nn.Module, **options: Any) -> Any:
    """Start memopt on a model and run the traced step and one under the plan; return the session."""
    import memopt

    run = memopt.start(model, regions=["layers"], **options)
    for i in range(2):
        simple_step(model, i)
    model.zero_grad()
    return run


INNOCENT = Program(build=functools.partial(Net, Innocent), step=simple_step, regions=["layers"])


# ------------------------------------------------------------------------------------------ rule 1: copy on write
class InPlace(Block):
    """An op output is scaled and rectified in place."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h.mul_(3)
        torch.relu_(h)
        return x + self.b(h)


class InPlaceThroughView(Block):
    """An op output is written through a slice, a reshape and a transpose of it."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sin(self.a(x))
        h[:, : WIDTH // 2].mul_(2.5)
        h.view(-1)[3:40].add_(0.25)
        h.t()[1].neg_()
        return x + self.b(h)


class _ScaleOut(torch.autograd.Function):
    """Writes its result with an out variant over an earlier op's output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x + 1.0
        z = y.cos()
        torch.mul(z, 2.0, out=y)
        return y + z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 0.5


class OutVariant(Block):
    """`out=` names an op output that was placed before."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(_ScaleOut.apply(self.a(x))))


class Foreach(Block):
    """A foreach op writes two earlier op outputs at once."""

    def forward(self, x: Tensor) -> Tensor:
        h, k = self.a(x), self.b(x)
        torch._foreach_mul_([h, k], 1.5)
        torch._foreach_add_([h, k], [k.detach().clone(), h.detach().clone()])
        return torch.tanh(h) + torch.sigmoid(k)


class MultiOutputWrite(Block):
    """One output of a multi-output op, and one chunk of a split, are modified."""

    def forward(self, x: Tensor) -> Tensor:
        values, index = torch.topk(self.a(x), 5, dim=-1)
        values.mul_(2.0)
        top, rest = self.b(x).split([5, WIDTH - 5], dim=-1)
        mixed = torch.cat([torch.tanh(top + values), rest.sigmoid()], dim=-1)
        return x.gather(1, index).sum(1, keepdim=True) + mixed


class IndexWrites(Block):
    """masked_fill_, index_put_, copy_ and scatter_ over op outputs."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h.masked_fill_(h < -0.3, -0.3)
        k = self.b(x)
        k[:, 2] = h[:, 1]
        k[torch.arange(3), torch.arange(3)] = 0.5
        z = torch.zeros_like(x).scatter_(1, torch.ones(ROWS, 1, dtype=torch.long), 2.0)
        z[1:3].copy_(k[1:3])
        return torch.tanh(h) + torch.sin(k) + z


class DataWrite(Block):
    """A write through `.data`, which bumps no version counter of the tensor."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h.data.mul_(2.0)
        return x + self.b(h)


class Gru(nn.Module):
    """A GRU: its CPU kernel updates gates in place."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(WIDTH // 4, WIDTH // 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.gru(x.view(ROWS, 4, WIDTH // 4))
        return x + out.flatten(1)


class ExpandedAndStrided(Block):
    """Op outputs that are expanded, overlapping or not contiguous, and writes to their bases."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).t().contiguous().t()
        h = h.sin()  # keeps the transposed strides
        wide = h.mean(0, keepdim=True).expand(ROWS, WIDTH)
        h.add_(wide)
        k = torch.as_strided(self.b(x).cos(), (ROWS, WIDTH - 1), (WIDTH, 1), 1)
        return F.pad(k, (0, 1)) * torch.tanh(h)


trap("1-in-place", InPlace)
trap("1-through-view", InPlaceThroughView)
trap("1-out-variant", OutVariant)
trap("1-foreach", Foreach)
trap("1-multi-output", MultiOutputWrite)
trap("1-index-writes", IndexWrites)
trap("1-data-write", DataWrite)
trap("1-gru", Gru)
trap("1-expanded", ExpandedAndStrided)
