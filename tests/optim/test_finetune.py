"""The promise of CI: a fine-tune with FRUGAL reaches AdamW's loss within 2 %, told by the example as users run it."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memopt.optim import Frugal, frugal_groups

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "06_frugal_finetune.py"


def test_finetune_reaches_the_loss_of_adamw(tmp_path):
    pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=250,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(tmp_path.iterdir()) == [], "an example leaves nothing behind"
    line = re.compile(r"memopt: (\w+): loss ([\d.]+) -> ([\d.]+), state ([\d,]+) bytes")
    results = {
        name: (float(before), float(after), int(state.replace(",", "")))
        for name, before, after, state in line.findall(done.stdout)
    }
    before, adamw, adamw_bytes = results["AdamW"]
    _, frugal, frugal_bytes = results["FRUGAL"]
    assert adamw < 0.97 * before  # there is something to learn
    assert frugal <= 1.02 * adamw
    assert frugal_bytes < 0.4 * adamw_bytes


@pytest.mark.slow
@pytest.mark.parametrize("seed", [10**5, 2 * 10**5])
def test_finetune_with_the_best_rate_of_each(seed):
    """The same batches for both, each at the best of three rates, so that neither is held back."""
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("example", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    prose, code = example.texts()
    base = example.small_llama()
    example.train(base, torch.optim.AdamW(base.parameters(), lr=3e-3), prose, 80, seed=1)

    def loss(make, rate):
        model = copy.deepcopy(base)
        example.train(model, make(model, rate), code, 80, seed=seed)
        return example.evaluate(model, code)

    def adamw(model, rate):
        return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)

    def frugal(model, rate):
        return Frugal(frugal_groups(model, density=0.25, update_gap=50), lr=rate)

    rates = (1e-3, 2e-3, 3e-3)
    assert min(loss(frugal, r) for r in rates) <= 1.02 * min(loss(adamw, r) for r in rates)
