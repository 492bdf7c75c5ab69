"""The settings of one parameter group, checked once, read everywhere.

A group is a plain dict (schedulers write its `lr`, checkpoints carry it); `Settings.of` turns it
into values and is the only reader of that dict's settings.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import torch

from memopt.optim.selections import selection_named, selection_names

ORDERS = ("random", "ascending", "descending", "mirror")
ON_SWITCH = ("reset", "project", "keep")
ROUNDINGS = ("nearest", "stochastic", "kahan")
# What the state's layout and the choice of every round follow from: the same from the first step on.
FIXED = (
    "split", "selection", "state_full", "quantize", "rounding", "arena_density", "seed", "order",
    "complement",
)  # fmt: skip


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        options = ", ".join(repr(option) for option in allowed)
        raise ValueError(f"{name}={value!r} is not known: choose one of {options}")


def _is_number(value: object, low: float, high: float) -> bool:
    return isinstance(value, Real) and low <= float(value) <= high


def _at_least(name: str, value: object, low: float) -> None:
    if not _is_number(value, low, sys.float_info.max):
        raise ValueError(f"{name}={value!r} must be a number of at least {low} and finite")


def _is_pair_of_betas(values: object) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) == 2
        and all(_is_number(beta, 0.0, 1.0) and beta < 1.0 for beta in values)
    )


def _check_seed(seed: object) -> None:
    if not isinstance(seed, Integral):  # choices follow from its text: 1 and 1.0 are two
        raise ValueError(f"seed={seed!r} must be a whole number")  # noqa: TRY004 - as all others


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One group's settings. Fields carry the names of `Frugal`'s arguments.

    `split` is False for groups that keep state for every element (density 1, no scales, no
    switches); `arena_density` is the largest density the group may ever take: the arena's size.
    """

    lr: float | torch.Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    density: float
    update_gap: int
    selection: str
    state_full: str
    state_free: str
    state_full_lr_scale: float
    state_free_lr_scale: float
    on_switch: str
    order: str
    complement: str
    quantize: str | None
    rounding: str
    capturable: bool
    maximize: bool
    seed: int
    split: bool
    arena_density: float

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Settings:
        """Read and check a parameter group."""
        values = {field.name: group[field.name] for field in fields(cls)}
        if isinstance(values["betas"], list):
            values["betas"] = tuple(values["betas"])
        return cls(**values)

    def __post_init__(self) -> None:
        self._check_numbers()
        _one_of("selection", self.selection, selection_names())
        _one_of("on_switch", self.on_switch, ON_SWITCH)
        _one_of("order", self.order, ORDERS)
        _one_of("complement", self.complement, ("exact", "reference"))
        _one_of("quantize", self.quantize, (None, "8bit"))
        _one_of("rounding", self.rounding, ROUNDINGS)
        if self.on_switch == "keep" and self.split and not self.low_rank:
            raise ValueError(
                f"on_switch='keep' leaves moments where they lie, which has a meaning only for"
                f" selection='svd' or 'random', not {self.selection!r}: use 'reset' or 'project'"
            )
        if self.capturable and self.split and self.low_rank:
            raise ValueError(
                f"capturable=True needs a selection that is known before the gradient:"
                f" selection={self.selection!r} is not; use blocks, columns, rows or coordinates"
            )

    def _check_numbers(self) -> None:
        _at_least("eps", self.eps, 0.0)
        _at_least("weight_decay", self.weight_decay, 0.0)
        _at_least("state_full_lr_scale", self.state_full_lr_scale, 0.0)
        _at_least("state_free_lr_scale", self.state_free_lr_scale, 0.0)
        if not _is_pair_of_betas(self.betas):
            raise ValueError(f"betas={self.betas!r} must be two numbers in [0, 1)")
        for name in ("density", "arena_density"):
            value = getattr(self, name)
            if not _is_number(value, 0.0, 1.0):
                raise ValueError(f"{name}={value!r} must lie in [0, 1]")
        if self.density > self.arena_density:
            raise ValueError(
                f"density={self.density!r} is above arena_density={self.arena_density!r}, for which"
                " the state was allocated: build the optimizer with the largest density of the run"
            )
        if not _is_number(self.update_gap, 1, 2**62) or self.update_gap != int(self.update_gap):
            raise ValueError(f"update_gap={self.update_gap!r} must be a whole number of at least 1")
        _check_seed(self.seed)

    def check_lr(self) -> None:
        """Refuse a learning rate that a user gives; a scheduler's may miss 0 by its rounding."""
        if not isinstance(self.lr, torch.Tensor):
            _at_least("lr", self.lr, 0.0)
        elif self.lr.numel() != 1:
            raise ValueError(f"lr is a tensor of {self.lr.numel()} numbers; it must hold one")

    @property
    def low_rank(self) -> bool:
        """Whether matrices have a subspace, not elements, with state."""
        return selection_named(self.selection).low_rank

    @property
    def full_scale(self) -> float:
        """Factor on the learning rate of the state-full part."""
        return self.state_full_lr_scale if self.split else 1.0

    @property
    def free_scale(self) -> float:
        """Factor on the learning rate of the state-free part."""
        return self.state_free_lr_scale if self.split else 1.0

    @property
    def current_density(self) -> float:
        """Density to use at the next switch."""
        return self.density if self.split else 1.0

    @property
    def largest_density(self) -> float:
        """Density the state is allocated for."""
        return self.arena_density if self.split else 1.0


def warn_of_no_effect(groups: Sequence[Mapping[str, Any]]) -> None:
    """Warn of settings that an optimizer was given and that change nothing in any of its groups."""
    split = [Settings.of(group) for group in groups if group["split"]]
    low = any(
        p.dtype in (torch.bfloat16, torch.float16) for group in groups for p in group["params"]
    )
    idle = {}
    for s in map(Settings.of, groups):
        rounds_codes = s.rounding == "stochastic" and s.quantize is not None
        if s.rounding != "nearest" and not low and not rounds_codes:
            idle[f"rounding={s.rounding!r}"] = "no parameter is bfloat16 or float16"
    for s in split:
        if s.order != "random" and all(other.selection != "blocks" for other in split):
            idle[f"order={s.order!r}"] = f"it is for selection='blocks', not {s.selection!r}"
        if s.complement != "exact" and not any(other.low_rank for other in split):
            idle[f"complement={s.complement!r}"] = f"selection {s.selection!r} has no subspace"
    for setting, reason in idle.items():
        warnings.warn(f"{setting} has no effect: {reason}", stacklevel=3)
