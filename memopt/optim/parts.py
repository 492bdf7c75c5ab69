"""What one round keeps state for in one parameter, and how it is cut into tiles.

A `Part` is the outcome of a selection for one parameter and one round. It cuts the parameter into
`Tile`s that cover every element exactly once; a tile is what the step works on at a time, so that
temporaries stay small. A tile's `Cut` separates its state-full numbers from the rest:

    full = cut.take(weight)      the numbers the state-full rule updates in place ...
    cut.put(weight, full)        ... and how the result returns to the weight
    cut.gather(grad)             the same numbers of the gradient
    cut.complement(grad)         the gradient the state-free rule sees
    cut.clean(update)            the state-free update, taken off the state-full subspace

For indices, `take` copies the chosen weights and `put` writes them back over the state-free result;
for a basis P (rows orthonormal), `take` gives zeros in the subspace and `put` adds `full @ P`.
Slots are positions in the parameter's state, in the order of its tiles.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor


class Cut:
    """A tile without state; the base of the others."""

    has_full = False
    has_free = True

    def take(self, weight: Tensor) -> Tensor:
        """Return what the state-full rule updates in place."""
        raise NotImplementedError

    def put(self, weight: Tensor, full: Tensor) -> None:
        """Bring the updated numbers back into the weight."""
        raise NotImplementedError

    def gather(self, grad: Tensor) -> Tensor:
        """Return the state-full numbers of the gradient."""
        raise NotImplementedError

    def complement(self, grad: Tensor) -> Tensor:
        """Return the gradient without its state-full part; never changes `grad`."""
        return grad

    def clean(self, update: Tensor) -> Tensor:
        """Return the state-free update without its share in the state-full part."""
        return update


class FullCut(Cut):
    """A tile that has state everywhere."""

    has_full = True
    has_free = False

    def take(self, weight: Tensor) -> Tensor:
        """Return the weight itself: the rule writes in place."""
        return weight

    def put(self, weight: Tensor, full: Tensor) -> None:
        """Nothing to do."""

    def gather(self, grad: Tensor) -> Tensor:
        """Return the gradient itself."""
        return grad


@dataclass(frozen=True)
class IndexCut(Cut):
    """Chosen rows (dim 0) or columns (dim 1) of the tile; dim None counts flat elements."""

    index: Tensor
    dim: int | None
    has_full = True

    def _seen(self, tensor: Tensor) -> tuple[Tensor, int]:
        return (tensor.view(-1), 0) if self.dim is None else (tensor, self.dim)

    def take(self, weight: Tensor) -> Tensor:
        """Copy the chosen weights."""
        seen, dim = self._seen(weight)
        return seen.index_select(dim, self.index)

    def put(self, weight: Tensor, full: Tensor) -> None:
        """Write the chosen weights over whatever the state-free rule left there."""
        seen, dim = self._seen(weight)
        seen.index_copy_(dim, self.index, full)

    def gather(self, grad: Tensor) -> Tensor:
        """Copy the chosen gradients."""
        return self.take(grad)

    def complement(self, grad: Tensor) -> Tensor:
        """Copy the gradient with zeros where it was chosen."""
        free = grad.clone()
        seen, dim = self._seen(free)
        seen.index_fill_(dim, self.index, 0.0)
        return free


@dataclass(frozen=True)
class BasisCut(Cut):
    """The span of `basis` (rank, columns), rows orthonormal."""

    basis: Tensor
    exact: bool
    has_full = True

    def _basis(self, like: Tensor) -> Tensor:
        return self.basis.to(like.dtype)

    def take(self, weight: Tensor) -> Tensor:
        """Return zeros of (rows, rank), to be filled with the update."""
        return weight.new_zeros(weight.shape[0], self.basis.shape[0])

    def put(self, weight: Tensor, full: Tensor) -> None:
        """Add the update, taken back to the full space."""
        weight.addmm_(full, self._basis(full))

    def gather(self, grad: Tensor) -> Tensor:
        """Return the coordinates of the gradient's rows in the basis."""
        return grad @ self._basis(grad).T

    def complement(self, grad: Tensor) -> Tensor:
        """Return the gradient minus its projection."""
        return grad.addmm(self.gather(grad), self._basis(grad), alpha=-1.0)

    def clean(self, update: Tensor) -> Tensor:
        """Take the projection off, as a sign leaves the complement (`s - P^T P s`)."""
        return self.complement(update) if self.exact else update


@dataclass(frozen=True)
class Tile:
    """Some rows (or flat elements) of a parameter.

    `slot` is the position of its state in the parameter's state, `num_slots` how many numbers of
    each moment it has there, `element` the flat index of its first weight.
    """

    weight: Tensor
    grad: Tensor
    cut: Cut
    slot: int
    num_slots: int
    element: int


def rows_per_tile(limit: int | None, columns: int, slots_per_row: int, align: int) -> int | None:
    """Return how many rows a tile of about `limit` numbers has; None means all.

    A tile's slots must start at a multiple of `align` (the quantisation block).
    """
    if limit is None:
        return None
    step = align // gcd(align, slots_per_row) if slots_per_row else 1
    return max(1, limit // max(1, columns * step)) * step


def ranges(size: int, step: int | None) -> Iterator[tuple[int, int]]:
    """Cut range(size) into runs of `step`; None gives one run, be it an empty one."""
    if step is None:
        yield 0, size
        return
    for start in range(0, size, step):
        yield start, min(size, start + step)


class Part(ABC):
    """The state-full part of one parameter in one round."""

    num_slots: int

    @abstractmethod
    def tiles(self, weight: Tensor, grad: Tensor, limit: int | None, align: int) -> Iterator[Tile]:
        """Cut the parameter (as a matrix) into tiles of about `limit` numbers (None: one)."""

    @abstractmethod
    def mask(self, rows: int, columns: int) -> Tensor:
        """Return which elements have state: bool (rows, columns)."""

    def carry(self, old: Part, moment: Tensor, *, signed: bool) -> Tensor:
        """Return this part's moment given the old part's, for `on_switch="project"`."""
        raise NotImplementedError


@dataclass(frozen=True)
class LeadingRows(Part):
    """The first `num_full_rows` rows of a matrix of `columns` columns: all, none or a beginning."""

    num_full_rows: int
    columns: int

    @property
    def num_slots(self) -> int:  # type: ignore[override]
        """Numbers with state."""
        return self.num_full_rows * self.columns

    def tiles(self, weight: Tensor, grad: Tensor, limit: int | None, align: int) -> Iterator[Tile]:
        """Yield the rows with state first, then the others."""
        columns, full_rows = self.columns, self.num_full_rows
        step = rows_per_tile(limit, columns, columns, align)
        for a, b in ranges(full_rows, step):
            num_slots = (b - a) * columns
            yield Tile(weight[a:b], grad[a:b], FullCut(), a * columns, num_slots, a * columns)
        for a, b in ranges(weight.shape[0] - full_rows, step):
            start, stop = a + full_rows, b + full_rows
            yield Tile(weight[start:stop], grad[start:stop], Cut(), 0, 0, start * columns)

    def mask(self, rows: int, columns: int) -> Tensor:
        """Return which elements have state."""
        chosen = torch.zeros(rows, columns, dtype=torch.bool)
        chosen[: self.num_full_rows] = True
        return chosen

    def carry(self, old: Part, moment: Tensor, *, signed: bool) -> Tensor:
        """Keep the rows that had state before."""
        new = moment.new_zeros(self.num_slots)
        kept = min(self.num_slots, old.num_slots)
        new[:kept] = moment[:kept]
        return new
