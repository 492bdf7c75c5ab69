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
def _move_small_tensors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small tensors move too: memopt keeps those below 64 KiB on the device, where most of these tests would be."""
    if request.path.stem in (
        "test_gpu_llama",
        "test_memory_bytes",
        "test_mode_cost",
        "test_predicted_bytes",
    ):
        return
    import sys as system

    import memopt.session  # noqa: F401 -- every module that holds the constant is loaded by it

    for name, module in list(system.modules.items()):
        if name.startswith("memopt.") and hasattr(module, "MIN_MOVE_BYTES"):
            monkeypatch.setattr(module, "MIN_MOVE_BYTES", 1)


@pytest.fixture(autouse=True)
def _measure_the_machine_once(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session measures the ways off the device (0.6 s with an SSD); what it finds changes no bit: once will do."""
    import memopt._resources as resources

    if "measured_anew" in request.fixturenames:
        return
    measure = resources.measure_hardware

    def measure_once(device: object, host: object, store: object) -> object:
        key = (str(device), host is None, store is None)
        if key not in _MEASURED:
            _MEASURED[key] = measure(device, host, store)
        return _MEASURED[key]

    monkeypatch.setattr(resources, "measure_hardware", measure_once)


@pytest.fixture
def measured_anew() -> bool:
    """For tests in which each session must measure the machine itself, as it does for users."""
    return True


_MEASURED: dict[tuple[str, bool, bool], object] = {}


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """No test may leave a dispatch mode, a hook on saved tensors or an autograd setting behind."""
    import torch
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode

    yield
    modes = _get_current_dispatch_mode_stack()
    for _ in modes:
        _pop_mode()  # one failed test must not fail all that follow
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    enabled = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert not modes
    assert hooks is None
    assert enabled
