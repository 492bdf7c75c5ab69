"""What a context may leave behind: patched attributes, hooks, threads, open files, live tensors, modes."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def _open_files() -> Counter[str]:
    """Open files and mapped files of this process; PyTorch's own libraries are mapped once and stay."""
    found: Counter[str] = Counter()
    for link in Path("/proc/self/fd").iterdir():
        try:
            found[str(link.readlink())] += 1
        except OSError:  # the descriptor of the listing itself
            continue
    return Counter(
        {
            name: count
            for name, count in found.items()
            if not name.startswith(("/proc", "pipe:", "socket:"))
        }
    )


def _hooks(owner: Any) -> dict[str, int]:
    return {
        name: len(value)
        for name, value in vars(owner).items()
        if "hooks" in name and hasattr(value, "__len__")
    }


def _live_tensor_bytes() -> int:
    storages = {}
    for item in gc.get_objects():
        try:
            if type(item) in (torch.Tensor, nn.Parameter):
                storage = item.untyped_storage()
                storages[storage._cdata] = storage.nbytes()
        except (ReferenceError, RuntimeError):  # dying, or without storage
            continue
    return sum(storages.values())


class Traces:
    """Remember the state of a model, its optimizer and the process; `check` wants it back."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        gc.collect()
        self.model, self.optimizer = model, optimizer
        self.attributes = {
            name: {k: id(v) for k, v in vars(m).items()} for name, m in model.named_modules()
        }
        self.hooks = {name: _hooks(m) for name, m in model.named_modules()}
        self.parameter_hooks = {
            name: len(p._backward_hooks or ()) for name, p in model.named_parameters()
        }
        self.optimizer_hooks = _hooks(optimizer) if optimizer is not None else {}
        self.threads = {t.ident for t in threading.enumerate()}
        self.files = _open_files()
        self.forwards = {name: m.forward for name, m in model.named_modules()}

    @staticmethod
    def figures() -> tuple[int, int, int, int]:
        """Live tensor bytes, threads, open files and objects of memopt's own classes."""
        gc.collect()
        objects = sum(str(type(o).__module__).startswith("memopt") for o in gc.get_objects())
        return _live_tensor_bytes(), threading.active_count(), sum(_open_files().values()), objects

    def check(self) -> None:
        """Compare with what was before; `.grad` of parameters is the caller's to clear."""
        gc.collect()
        for name, module in self.model.named_modules():
            now = {k: id(v) for k, v in vars(module).items()}
            assert now.keys() == self.attributes[name].keys(), (
                f"{name}: attributes added or removed"
            )
            changed = [
                k for k, v in now.items() if v != self.attributes[name][k] and k != "training"
            ]
            assert not changed, f"{name}: attributes replaced: {changed}"
            assert _hooks(module) == self.hooks[name], f"{name}: hooks remain"
            assert module.forward == self.forwards[name], f"{name}: forward is not the class's own"
        left = {n: len(p._backward_hooks or ()) for n, p in self.model.named_parameters()}
        assert left == self.parameter_hooks, "hooks on parameters remain"
        if self.optimizer is not None:
            assert _hooks(self.optimizer) == self.optimizer_hooks, "hooks on the optimizer remain"
        threads = [t.name for t in threading.enumerate() if t.ident not in self.threads]
        assert not threads, f"threads remain: {threads}"
        extra = _open_files() - self.files
        assert not extra, f"open files remain: {dict(extra)}"
        assert not _get_current_dispatch_mode_stack(), "a dispatch mode remains"
