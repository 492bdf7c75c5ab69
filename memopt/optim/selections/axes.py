"""Columns, rows, and the longer of the two (the reference's "randperm").

Columns are columns of torch's (out, in) weight: dim 1. They are drawn at random, not by gradient
norm, k = floor(density * n) of each tensor; the state is (rows, k) or (k, columns).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from memopt.ops.counter_rng import random_subset
from memopt.optim.parts import IndexCut, LeadingRows, Part, Tile, ranges, rows_per_tile
from memopt.optim.selections.base import Choice, Selection
from memopt.optim.tensors import share


def common_positions(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions of the shared entries in two ascending index vectors."""
    at_new = torch.isin(new, old).nonzero().view(-1)
    return torch.searchsorted(old, new[at_new]), at_new


@dataclass(frozen=True)
class ChosenColumns(Part):
    """Columns `index` (ascending) of a matrix of `rows` rows."""

    index: Tensor
    rows: int

    @property
    def num_slots(self) -> int:  # type: ignore[override]
        """Numbers with state."""
        return self.rows * self.index.numel()

    def tiles(self, weight: Tensor, grad: Tensor, limit: int | None, align: int) -> Iterator[Tile]:
        """Cut by rows; every tile has the same columns."""
        count, columns = self.index.numel(), weight.shape[1]
        cut = IndexCut(self.index, 1)
        for a, b in ranges(self.rows, rows_per_tile(limit, columns, count, align)):
            yield Tile(weight[a:b], grad[a:b], cut, a * count, (b - a) * count, a * columns)

    def mask(self, rows: int, columns: int) -> Tensor:
        """Return which elements have state."""
        chosen = torch.zeros(rows, columns, dtype=torch.bool)
        chosen[:, self.index.cpu()] = True
        return chosen

    def carry(self, old: Part, moment: Tensor, *, signed: bool) -> Tensor:
        """Keep the columns chosen in both rounds."""
        assert isinstance(old, ChosenColumns)
        at_old, at_new = common_positions(old.index, self.index)
        new = moment.new_zeros(self.rows, self.index.numel())
        new.index_copy_(1, at_new, moment.view(self.rows, -1).index_select(1, at_old))
        return new.view(-1)


@dataclass(frozen=True)
class ChosenRows(Part):
    """Rows `index` (ascending) of a matrix of `columns` columns."""

    index: Tensor
    columns: int

    @property
    def num_slots(self) -> int:  # type: ignore[override]
        """Numbers with state."""
        return self.columns * self.index.numel()

    @cached_property
    def _rows(self) -> list[int]:
        return self.index.tolist()  # type: ignore[no-any-return]

    def tiles(self, weight: Tensor, grad: Tensor, limit: int | None, align: int) -> Iterator[Tile]:
        """Cut between chosen rows, so that a tile's slots are a run of the state."""
        columns, chosen = self.columns, self._rows
        density = max(1, weight.shape[0]) / max(1, len(chosen))
        wanted = None if limit is None else max(1, int(limit / density))
        step = rows_per_tile(wanted, columns, columns, align)
        first_row = 0
        for a, b in ranges(len(chosen), step):
            last_row = weight.shape[0] if b == len(chosen) else chosen[b]
            cut = IndexCut(self.index[a:b] - first_row, 0)
            rows = slice(first_row, last_row)
            yield Tile(
                weight[rows], grad[rows], cut, a * columns, (b - a) * columns, first_row * columns
            )
            first_row = last_row

    def mask(self, rows: int, columns: int) -> Tensor:
        """Return which elements have state."""
        chosen = torch.zeros(rows, columns, dtype=torch.bool)
        chosen[self.index.cpu()] = True
        return chosen

    def carry(self, old: Part, moment: Tensor, *, signed: bool) -> Tensor:
        """Keep the rows chosen in both rounds."""
        assert isinstance(old, ChosenRows)
        at_old, at_new = common_positions(old.index, self.index)
        new = moment.new_zeros(self.index.numel(), self.columns)
        new.index_copy_(0, at_new, moment.view(-1, self.columns).index_select(0, at_old))
        return new.view(-1)


def chosen_lines(choice: Choice, dim: int) -> Part:
    """Draw rows (dim 0) or columns (dim 1); all or none need no index."""
    size = (choice.rows, choice.columns)[dim]
    count = share(choice.density, size)
    if count in (0, size):
        return LeadingRows(choice.rows if count else 0, choice.columns)
    index = random_subset(choice.key, size, count, choice.device)
    return ChosenColumns(index, choice.rows) if dim == 1 else ChosenRows(index, choice.columns)


class Columns(Selection):
    """Random columns (dim 1)."""

    name = "columns"
    needs_matrix = True

    def num_slots(self, rows: int, columns: int, density: float) -> int:
        """Rows times the chosen columns."""
        return rows * share(density, columns)

    def choose(self, choice: Choice) -> Part:
        """Draw columns."""
        return chosen_lines(choice, 1)

    def describe(self) -> str:
        """One line for tables."""
        return "floor(density x n) random columns of each tensor"


class Rows(Selection):
    """Random rows (dim 0)."""

    name = "rows"
    needs_matrix = True

    def num_slots(self, rows: int, columns: int, density: float) -> int:
        """Columns times the chosen rows."""
        return columns * share(density, rows)

    def choose(self, choice: Choice) -> Part:
        """Draw rows."""
        return chosen_lines(choice, 0)

    def describe(self) -> str:
        """One line for tables."""
        return "floor(density x n) random rows of each tensor"


class RandomAxis(Selection):
    """Columns where out >= in, else rows: a random coordinate subspace of the shorter side."""

    name = "randperm"
    needs_matrix = True

    def num_slots(self, rows: int, columns: int, density: float) -> int:
        """As columns or rows."""
        return (Columns() if rows >= columns else Rows()).num_slots(rows, columns, density)

    def choose(self, choice: Choice) -> Part:
        """Draw along the shorter side."""
        return chosen_lines(choice, 1 if choice.rows >= choice.columns else 0)

    def describe(self) -> str:
        """One line for tables."""
        return "random columns where out >= in, else random rows"
