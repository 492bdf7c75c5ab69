"""Every example runs, in a process of its own, in seconds."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
RUN_ELSEWHERE = {"06_frugal_finetune": ROOT / "tests/optim/test_finetune.py"}  # long: once will do


def test_there_are_examples_and_they_are_numbered_without_gaps():
    numbers = [int(path.name[:2]) for path in EXAMPLES]
    assert numbers == list(range(1, len(EXAMPLES) + 1))
    assert len(numbers) >= 5


def test_examples_that_run_elsewhere_do():
    for name, test in RUN_ELSEWHERE.items():
        assert f"{name}.py" in test.read_text()


@pytest.mark.parametrize(
    "path", [e for e in EXAMPLES if e.stem not in RUN_ELSEWHERE], ids=lambda path: path.stem
)
def test_example(path, tmp_path):
    source = path.read_text()
    for name in re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{path.name} needs {name}, which is not installed")
    done = subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "memopt: " in done.stdout, "every example prints a report"
    assert list(tmp_path.iterdir()) == [], "an example leaves nothing behind"
