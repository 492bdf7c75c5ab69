"""The promise of CI: a fine-tune of the demo's model with FRUGAL reaches AdamW's loss within 2 %."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "06_frugal_finetune.py"


@pytest.mark.parametrize("layers", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_finetune_reaches_the_loss_of_adamw(layers):
    pytest.importorskip("transformers")
    from memopt.cli.demo_worker import DemoConfig, build_model

    example = runpy.run_path(str(EXAMPLE))
    model = build_model(DemoConfig(num_layers=layers, sequence_length=example["LENGTH"]))
    results = example["main"](40, 60, model)
    before, (adamw, adamw_bytes), (frugal, frugal_bytes) = (
        results["before fine-tuning"][0], results["AdamW"], results["FRUGAL"],
    )  # fmt: skip
    assert adamw < 0.97 * before  # there is something to learn
    assert frugal <= 1.02 * adamw
    assert frugal_bytes < 0.4 * adamw_bytes
