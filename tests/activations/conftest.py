"""Shared by the tests of the activation engine: their harness is importable, one thread, transformers is quiet."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `_bitwise`, `_models` ...: tests are no package
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors are faster on one thread, and the bits of a GEMM may depend on the number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """No test may leave a dispatch mode, a hook on saved tensors or an autograd setting behind."""
    import torch
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    yield
    assert not _get_current_dispatch_mode_stack()
    assert torch.is_grad_enabled()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
