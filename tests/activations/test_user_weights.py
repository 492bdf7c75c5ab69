"""Weights and buffers that are not what a plain `nn.Parameter` is: made elsewhere, written or exchanged on the way."""

from __future__ import annotations

import pytest
import torch
from _bitwise import assert_bitwise, some
from _traps import ROWS, WIDTH, Block, Net
from _user_program import program
from torch import Tensor

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
