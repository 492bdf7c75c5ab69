"""The optimizers that `bench_frugal_quality.py` compares, with the learning rates to choose from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _byte_llama import Llama
from torch import Tensor

from memopt.optim import Frugal, frugal_groups
from memopt.optim.presets import badam, galore, scale, sinkgd

CORE = ("AdamW", "FRUGAL 0.25", "GaLore 0.25")  # what the claim is about: first in line
EXTRA = (
    "FRUGAL 0.25 svd, exact",
    "FRUGAL 0.25 svd, reference",
    "FRUGAL 0.25 columns",
    "FRUGAL 0.25 columns, free 0.3",
    "FRUGAL 0.25, free 0.3",
    "FRUGAL 0.25, free 0.1",
    "FRUGAL 0, free 0.3",
    "GaLore 0.25, alpha 1",
    "FRUGAL 0.25, scale 0.25",
    "FRUGAL 0.25, scale 0.25, free 0.075",
    "FRUGAL 0.25 columns, scale 0.25, free 0.075",
    "AdamW, scale 0.25",
    "SinkGD",
)  # by --methods


@dataclass(frozen=True, kw_only=True)
class Method:
    """An optimizer of (model, lr), and the learning rates that its grid begins with."""

    make: Callable[[Llama, float], torch.optim.Optimizer]
    grid: tuple[float, ...]


def methods(gap: int) -> dict[str, Method]:
    """Return what is compared; all split methods share roles (`frugal_groups`) and gap."""

    def split(density: float, **more: Any) -> Callable[[Llama, float], torch.optim.Optimizer]:
        return lambda m, lr: Frugal(frugal_groups(m, density, **more), lr=lr, update_gap=gap)

    def gentle(density: float, scale: float, selection: str = "blocks") -> Method:
        """Smaller steps for the rest than for what has state: the other rates may then be higher."""
        make = split(density, state_free_lr_scale=scale, selection=selection)
        return Method(make=make, grid=(1e-3, 3e-3, 9e-3))

    def at_galores_rates(full: float, free: float, selection: str = "blocks") -> Method:
        """GaLore's recipe for rates: embeddings and head at `lr`, the blocks' matrices below it."""
        make = split(0.25, state_full_lr_scale=full, state_free_lr_scale=free, selection=selection)
        return Method(make=make, grid=(3.3e-3, 1e-2, 3e-2))

    def subspace(complement: str) -> Method:
        return Method(
            make=split(0.25, selection="svd", complement=complement), grid=(3.3e-4, 1e-3, 3e-3)
        )

    def adamw(m: Llama, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(m.parameters(), lr=lr, weight_decay=0.0, fused=True)

    def adamw_at_galores_rates(m: Llama, lr: float) -> torch.optim.Optimizer:
        """The control: does GaLore's lead come from its method or from its rates?"""
        groups = [
            {
                "params": [p for _, p in group["params"]],
                "lr": lr * (0.25 if group.get("split", True) else 1.0),
            }
            for group in frugal_groups(m, 0.25)
        ]
        return torch.optim.AdamW(groups, lr=lr, weight_decay=0.0, fused=True)

    def galore_like(m: Llama, lr: float) -> torch.optim.Optimizer:
        return galore(frugal_groups(m, 0.25), lr=lr, update_gap=gap)

    def galore_evenly(m: Llama, lr: float) -> torch.optim.Optimizer:
        """One rate for all parameters; with alpha 0.25 embeddings and head have four times it."""
        return galore(frugal_groups(m, 0.25), lr=lr, update_gap=gap, alpha=1.0)

    def badam_like(m: Llama, lr: float) -> torch.optim.Optimizer:
        return badam(frugal_groups(m), lr=lr, num_blocks=4, switch_every=gap)

    return {
        "AdamW": Method(make=adamw, grid=(1e-3, 3e-3, 9e-3)),
        "FRUGAL 0.25": Method(make=split(0.25), grid=(3.3e-4, 1e-3, 3e-3)),
        "GaLore 0.25": Method(make=galore_like, grid=(3.3e-3, 1e-2, 3e-2)),
        "FRUGAL 0": Method(make=split(0.0), grid=(3.3e-4, 1e-3, 3e-3)),
        "BAdam-like": Method(make=badam_like, grid=(1e-3, 3e-3, 9e-3)),
        "SCALE": Method(make=lambda m, lr: scale(m, lr=lr, adam_lr=2e-3), grid=(1e-2, 3e-2, 9e-2)),
        "FRUGAL 0.25 svd, exact": subspace("exact"),
        "FRUGAL 0.25 svd, reference": subspace("reference"),
        "FRUGAL 0.25 columns": Method(
            make=split(0.25, selection="columns"), grid=(3.3e-4, 1e-3, 3e-3)
        ),
        "FRUGAL 0.25 columns, free 0.3": gentle(0.25, 0.3, "columns"),
        "FRUGAL 0.25, free 0.3": gentle(0.25, 0.3),
        "FRUGAL 0.25, free 0.1": gentle(0.25, 0.1),
        "FRUGAL 0, free 0.3": gentle(0.0, 0.3),
        "GaLore 0.25, alpha 1": Method(make=galore_evenly, grid=(8.3e-4, 2.5e-3, 7.5e-3)),
        "FRUGAL 0.25, scale 0.25": at_galores_rates(0.25, 0.25),
        "FRUGAL 0.25, scale 0.25, free 0.075": at_galores_rates(0.25, 0.075),
        "FRUGAL 0.25 columns, scale 0.25, free 0.075": at_galores_rates(0.25, 0.075, "columns"),
        "AdamW, scale 0.25": Method(make=adamw_at_galores_rates, grid=(3.3e-3, 1e-2, 3e-2)),
        "SinkGD": Method(
            make=lambda m, lr: sinkgd(frugal_groups(m), lr=lr), grid=(3.3e-4, 1e-3, 3e-3)
        ),
    }


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of optimizer state."""
    if isinstance(optimizer, Frugal):
        return optimizer.state_bytes()
    tensors = [
        v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)
    ]
    return sum(t.numel() * t.element_size() for t in tensors)
