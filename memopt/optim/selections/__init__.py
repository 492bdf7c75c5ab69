"""Selections: which part of each parameter has optimizer state in a round.

A new one is a file with a `Selection` subclass and a `register_selection` call.
"""

from __future__ import annotations

from memopt.optim.selections.axes import Columns, RandomAxis, Rows
from memopt.optim.selections.base import Choice, Selection
from memopt.optim.selections.blocks import Blocks
from memopt.optim.selections.coordinates import Coordinates
from memopt.optim.selections.lowrank import RandomBasis, SingularBasis

_SELECTIONS: dict[str, Selection] = {}


def register_selection(selection: Selection) -> None:
    """Make a selection available as `Frugal(selection=selection.name)`."""
    _SELECTIONS[selection.name] = selection


for _selection in (
    Blocks(), Columns(), Rows(), Coordinates(), SingularBasis(), RandomBasis(), RandomAxis(),
):  # fmt: skip
    register_selection(_selection)


def selection_names() -> tuple[str, ...]:
    """Return the names that `Frugal(selection=...)` takes."""
    return tuple(_SELECTIONS)


def selection_named(name: str, num_dimensions: int = 2) -> Selection:
    """Return the selection for a parameter: vectors under a matrix selection use coordinates."""
    selection = _SELECTIONS[name]
    if selection.needs_matrix and num_dimensions < 2:
        return _SELECTIONS["coordinates"]
    return selection


__all__ = ["Choice", "Selection", "register_selection", "selection_named", "selection_names"]
