from __future__ import annotations

import pytest
import torch
from torch import nn

from memopt.optim import Frugal, frugal_groups


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)


class Model(nn.Module):
    def __init__(self, *, tied=False):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.layers = nn.ModuleList([Block(8) for _ in range(12)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 50, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def split_names(groups):
    return {a.name for a in groups.assignments if a.split}


@pytest.mark.parametrize("tied", [False, True])
def test_the_linear_weights_of_blocks_are_split(tied):
    groups = frugal_groups(Model(tied=tied), 0.25)
    expected = {f"layers.{i}.{n}.weight" for i in range(12) for n in ("up", "down")}
    assert split_names(groups) == expected
    optimizer = Frugal(groups, lr=1e-3)
    assert [group["split"] for group in optimizer.param_groups] == [True, False]
    assert optimizer.param_groups[0]["param_names"][0] == "layers.0.up.weight"
    model_params = sum(p.numel() for p in Model(tied=tied).parameters())
    grouped = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert grouped == model_params


def test_patterns():
    groups = frugal_groups(Model(), 0.25, always_full=["layers.1.*"], split=["head.weight"])
    names = split_names(groups)
    assert "head.weight" in names
    assert "layers.1.up.weight" not in names
    assert "layers.10.up.weight" in names  # "layers.1" is no prefix
    with pytest.raises(ValueError, match="matches no"):
        frugal_groups(Model(), always_full=["lm_head*"])


def test_flat_models_and_frozen_parameters():
    flat = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert split_names(frugal_groups(flat)) == {"0.weight", "2.weight"}
    flat[0].requires_grad_(False)
    assert split_names(frugal_groups(flat)) == {"2.weight"}
    for p in flat.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable"):
        frugal_groups(flat)


@pytest.mark.parametrize("selection", ["blocks", "columns", "svd"])
def test_predicted_bytes_are_what_the_optimizer_allocates(selection):
    groups = frugal_groups(Model(), 0.25, selection=selection)
    predicted = groups.state_bytes()
    optimizer = Frugal(groups, lr=1e-3)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer.state_bytes() == predicted


def test_table_is_printed():
    text = str(frugal_groups(Model(), 0.25))
    for word in ("linear in a block", "split, density 0.25", "embedding", "always full", "3,072"):
        assert word in text
