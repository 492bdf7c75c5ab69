"""FRUGAL and its family: optimizers that keep state for a part of the parameters at a time."""

from __future__ import annotations

from memopt.optim.frugal import Frugal
from memopt.optim.groups import FrugalGroups, frugal_groups
from memopt.optim.rules import register_state_free, register_state_full
from memopt.optim.selections import register_selection

__all__ = [
    "Frugal",
    "FrugalGroups",
    "frugal_groups",
    "register_selection",
    "register_state_free",
    "register_state_full",
]
