"""The benchmark of the dispatch modes runs what it says it runs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("bench_mode_cost")


def test_result_holds_every_variant(bench, tmp_path, capsys):
    out = tmp_path / "mode_cost.json"
    threads = torch.get_num_threads()
    try:
        assert bench.main(["--out", str(out), "--layers", "1", "--passes", "5"]) == 0
    finally:
        torch.set_num_threads(threads)
    result = json.loads(out.read_text())
    assert result["us_per_op"].keys() == set(bench.VARIANTS)
    assert result["us_above_no_mode"]["empty mode"] > 0, "a mode in Python cannot be free"
    assert result["us_above_no_mode"]["forward"] > 0
    assert "recompute, answered" in capsys.readouterr().out


def test_variants_run_the_program_under_the_modes_they_name(bench):
    modes = bench.Modes(bench.make_program(2))
    plain = modes.program()
    assert 100 <= len(modes.ops) <= 200  # about 70 a layer
    assert len(modes.kept.frame.answers) > 20, (
        "nothing was kept: `answered` would measure `recompute`"
    )
    assert not modes.bare.frame.answers
    for variant in bench.VARIANTS:
        mode = modes.make(variant)
        with mode:
            out = modes.program()
        assert torch.equal(out, plain), variant
        if variant.startswith("recompute"):
            assert mode.position == len(modes.ops)
