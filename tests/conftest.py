"""What all tests share: marked GPU tests are skipped, with a reason, where there is no CUDA device."""

from __future__ import annotations

import functools
import os

import pytest

# Rates kept for this machine must not decide what tests see, nor tests what is kept.
os.environ["MEMOPT_CACHE"] = "off"


@functools.cache
def why_no_gpu() -> str:
    """Return why GPU tests cannot run here; empty where they can."""
    import torch

    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    return "" if torch.cuda.is_available() else "no CUDA device"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and why_no_gpu():
            item.add_marker(pytest.mark.skip(reason=why_no_gpu()))


@pytest.fixture(autouse=True)
def _tables_are_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables take the terminal's width: what is read from them must not depend on who runs the tests where."""
    monkeypatch.setenv("COLUMNS", "120")
