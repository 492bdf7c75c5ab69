"""Columns, rows, and the longer of the two (the reference's "randperm").

Columns are columns of torch's (out, in) weight: dim 1. They are drawn at random, not by gradient
norm, k = floor(density * n) of each tensor; the state is (rows, k) or (k, columns).
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from memopt.ops.counter_rng import random_subsets
from memopt.ops.frugal_draw import Lines
from memopt.optim.parts import IndexCut, LeadingRows, Part, Tile, ranges, rows_per_tile
from memopt.optim.selections.base import Choice, Selection
from memopt.optim.tensors import share


def carry_chosen(old: Tensor, new: Tensor, moment: Tensor, dim: int) -> Tensor:
    """Return the moment of the entries `new` given that of `old`; 0 for what `old` lacks.

    Args:
        old: ascending numbers of the entries that were chosen (int64), not none.
        new: those that are chosen now.
        moment: floating-point, one entry of `old` at each position along `dim`.
        dim: 0, or 1 for columns.

    The sizes do not depend on how many stay: no wait for the device.
    """
    at = torch.searchsorted(old, new).clamp_(max=old.numel() - 1)
    lacking = old.index_select(0, at) != new
    carried = moment.index_select(dim, at)
    return carried.masked_fill_(lacking.unsqueeze(1) if moment.dim() > dim + 1 else lacking, 0.0)


@dataclass(frozen=True)
class Draw:
    """`count` of `size` lines for each key. The kernel draws them itself: indices are made on demand."""

    keys: tuple[int, ...]
    size: int
    count: int
    device: torch.device

    @cached_property
    def indices(self) -> Tensor:
        """The drawn lines of every key, ascending: int64 (keys, count)."""
        return random_subsets(self.keys, self.size, self.count, self.device)


@dataclass(frozen=True)
class Drawn(Part):
    """What columns and rows share: number `member` of a draw; `length` is a line's elements."""

    lines: ClassVar[int]
    draw: Draw
    member: int
    length: int

    @property
    def key(self) -> int:
        """Of the draw."""
        return self.draw.keys[self.member]

    @cached_property
    def index(self) -> Tensor:
        """The chosen lines, ascending (int64)."""
        return self.draw.indices[self.member]

    @property
    def num_slots(self) -> int:  # type: ignore[override]
        """Numbers with state."""
        return self.length * self.draw.count


class ChosenColumns(Drawn):
    """Some columns of a matrix of `length` rows."""

    lines = int(Lines.COLUMNS)

    def tiles(self, weight: Tensor, grad: Tensor, limit: int | None, align: int) -> Iterator[Tile]:
        """Cut by rows; every tile has the same columns."""
        count, columns = self.draw.count, weight.shape[1]
        cut = IndexCut(self.index, 1)
        for a, b in ranges(self.length, rows_per_tile(limit, columns, count, align)):
            yield Tile(weight[a:b], grad[a:b], cut, a * count, (b - a) * count, a * columns)

    def mask(self, rows: int, columns: int) -> Tensor:
        """Return which elements have state."""
        chosen = torch.zeros(rows, columns, dtype=torch.bool)
        chosen[:, self.index.cpu()] = True
        return chosen

    def carry(self, old: Part, moment: Tensor, *, signed: bool) -> Tensor:
        """Keep the columns chosen in both rounds."""
        assert isinstance(old, ChosenColumns)
        before = moment.view(self.length, old.draw.count)
        return carry_chosen(old.index, self.index, before, 1).view(-1)


class ChosenRows(Drawn):
    """Some rows of a matrix of `length` columns."""

    lines = int(Lines.ROWS)

    @cached_property
    def _rows(self) -> list[int]:
        return self.index.tolist()

    def tiles(self, weight: Tensor, grad: Tensor, limit: int | None, align: int) -> Iterator[Tile]:
        """Cut between chosen rows, so that a tile's slots are a run of the state."""
        columns, chosen = self.length, self._rows
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
        before = moment.view(old.draw.count, self.length)
        return carry_chosen(old.index, self.index, before, 0).view(-1)


def chosen_lines(choices: Sequence[Choice], dims: Sequence[int]) -> list[Part]:
    """Draw rows (dim 0) or columns (dim 1) of several parameters; all or none need no index."""
    parts: list[Part | None] = [None] * len(choices)
    alike: dict[tuple[int, int, torch.device], list[int]] = defaultdict(list)
    for i, (choice, dim) in enumerate(zip(choices, dims, strict=True)):
        size = (choice.rows, choice.columns)[dim]
        count = share(choice.density, size)
        if count in (0, size):
            parts[i] = LeadingRows(choice.rows if count else 0, choice.columns)
        else:
            alike[size, count, choice.device].append(i)
    for (size, count, device), members in alike.items():
        draw = Draw(tuple(choices[i].key for i in members), size, count, device)
        for number, i in enumerate(members):
            columns = dims[i] == 1
            kind, length = (
                (ChosenColumns, choices[i].rows) if columns else (ChosenRows, choices[i].columns)
            )
            parts[i] = kind(draw, number, length)
    return [part for part in parts if part is not None]


class _Axis(Selection):
    """What columns, rows and randperm share."""

    needs_matrix = True

    @abstractmethod
    def dim(self, rows: int, columns: int) -> int:
        """1 to draw columns, 0 to draw rows."""

    def num_slots(self, rows: int, columns: int, density: float) -> int:
        """The other side times floor(density * n)."""
        if self.dim(rows, columns) == 1:
            return rows * share(density, columns)
        return columns * share(density, rows)

    def choose(self, choice: Choice) -> Part:
        """Draw for one parameter."""
        return self.choose_many([choice])[0]

    def choose_many(self, choices: Sequence[Choice]) -> list[Part]:
        """Draw for many at once: tensors of one size share their launches."""
        return chosen_lines(choices, [self.dim(c.rows, c.columns) for c in choices])


class Columns(_Axis):
    """Random columns (dim 1)."""

    name = "columns"

    def dim(self, rows: int, columns: int) -> int:
        """Columns."""
        return 1

    def describe(self) -> str:
        """One line for tables."""
        return "floor(density x n) random columns of each tensor"


class Rows(_Axis):
    """Random rows (dim 0)."""

    name = "rows"

    def dim(self, rows: int, columns: int) -> int:
        """Rows."""
        return 0

    def describe(self) -> str:
        """One line for tables."""
        return "floor(density x n) random rows of each tensor"


class RandomAxis(_Axis):
    """Columns where out >= in, else rows: a random coordinate subspace of the shorter side."""

    name = "randperm"

    def dim(self, rows: int, columns: int) -> int:
        """The shorter side."""
        return 1 if rows >= columns else 0

    def describe(self) -> str:
        """One line for tables."""
        return "random columns where out >= in, else random rows"
