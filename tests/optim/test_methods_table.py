"""The table of methods in docs/optimizer_methods.md: each line is run, and must keep what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from memopt.optim import Frugal, frugal_groups, presets

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "optimizer_methods.md"


class Block(nn.Module):
    def __init__(self, hidden, ffn):
        super().__init__()
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Linear(hidden, hidden, bias=False))
        self.gate, self.up = (nn.Linear(hidden, ffn, bias=False) for _ in range(2))
        self.down = nn.Linear(ffn, hidden, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)


class Llama(nn.Module):
    """The parameters of LLaMA-1B, as the page describes them."""

    def __init__(self, hidden=2048, ffn=5461, layers=24, vocabulary=32_000):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList([Block(hidden, ffn) for _ in range(layers)])
        self.norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)


def rows():
    """Return (method, code, GiB, bytes a parameter) of every line of the table."""
    cells = [
        line.strip("|").split("|") for line in PAGE.read_text().splitlines() if line[:1] == "|"
    ]
    return [
        (name.strip(), re.search("`([^`]+)`", code)[1], gib.strip(), each.strip())
        for name, code, gib, each in cells[2:]
    ]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0].split(" (")[0])
def test_state_of_every_method(row):
    _, code, gib, each = row
    with torch.device("meta"):
        model = Llama()
    names = {name: getattr(presets, name) for name in presets.__all__}
    names |= {"Frugal": Frugal, "frugal_groups": frugal_groups, "model": model}
    names |= {"params": model.parameters(), "groups": frugal_groups(model)}
    made = eval(code, names)
    optimizer = made[0] if isinstance(made, tuple) else made
    for group in optimizer.param_groups:
        optimizer._group_state(group, group["params"])
    elements = sum(p.numel() for p in model.parameters())
    assert f"{optimizer.state_bytes() / 2**30:.3f}" == gib
    assert f"{optimizer.state_bytes() / elements:.3f}" == each


def test_every_preset_is_in_the_table_and_short():
    shown = {row[1].split("(")[0] for row in rows()}
    for path in sorted((ROOT / "memopt" / "optim" / "presets").glob("[!_]*.py")):
        assert path.stem in shown
        assert len(path.read_text().splitlines()) < 150
