"""The promise of CI: a fine-tune with FRUGAL reaches AdamW's loss within 2 %, told by the example as users run it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
