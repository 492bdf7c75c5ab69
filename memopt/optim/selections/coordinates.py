"""Single elements, without an index in memory.

A uniformly drawn subset of a tensor's elements needs 4 bytes an index, as much as a whole moment.
Instead, the flat tensor of N elements is cut into k = floor(density * N) strata of N/k elements
(with a random offset in each round), and every stratum gives the element that a hash of (key,
stratum) points at. The choice is computed, never stored; exactly k elements, ascending; every
element is chosen with probability k/N except for those of the first and last stratum, whose
lengths vary. Unlike an unstratified draw, two elements closer than a stratum are rarely chosen together.

Stratum j covers [begin(j), begin(j + 1)), begin(0) = 0, begin(k) = N, else
begin(j) = floor((j N + u) / k) with u in [0, N) drawn from the key.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from memopt.ops.counter_rng import bits_at, random_bits
from memopt.optim.parts import IndexCut, LeadingRows, Part, Tile
from memopt.optim.selections.axes import carry_chosen
from memopt.optim.selections.base import Choice, Selection
from memopt.optim.tensors import share

CARRIED = 1 << 19  # strata whose elements are compared at a time when moments are carried
_OFFSET_INDEX = (1 << 40) + 1  # a hash position that no stratum uses


@dataclass(frozen=True)
class Strata(Part):
    """One element of each of `count` strata of a flat tensor of `size` elements."""

    key: int
    size: int
    count: int
    device: torch.device

    @property
    def num_slots(self) -> int:  # type: ignore[override]
        """Numbers with state: one a stratum."""
        return self.count

    @property
    def offset(self) -> int:
        """The u of the module's text, in [0, size)."""
        return (bits_at(self.key, _OFFSET_INDEX) * self.size) >> 32

    def begin(self, stratum: int) -> int:
        """Return the first element of a stratum."""
        if stratum <= 0:
            return 0
        if stratum >= self.count:
            return self.size
        return (stratum * self.size + self.offset) // self.count

    def stratum_of(self, element: int) -> int:
        """Return the stratum that an element lies in."""
        return max(0, ((element + 1) * self.count - 1 - self.offset) // self.size)

    def index(self, first: int, last: int) -> Tensor:
        """Return the chosen element of strata [first, last), ascending (int64)."""
        stratum = torch.arange(first, last + 1, device=self.device)
        edge = (stratum * self.size + self.offset).div_(self.count, rounding_mode="floor")
        if first == 0:
            edge[0] = 0
        if last == self.count:
            edge[-1] = self.size
        begin, length = edge[:-1], edge[1:] - edge[:-1]
        chance = random_bits(self.key, stratum[:-1])
        return begin + (chance * length).bitwise_right_shift_(32)

    def tiles(self, weight: Tensor, grad: Tensor, limit: int | None, align: int) -> Iterator[Tile]:
        """Cut between strata, so that a tile's slots are a run of the state."""
        step = self.count
        if limit is not None:
            per_tile = limit * self.count // max(1, self.size)
            step = max(1, per_tile // align) * align
        flat_weight, flat_grad = weight.view(-1), grad.view(-1)
        for first in range(0, self.count, step):
            last = min(self.count, first + step)
            a, b = self.begin(first), self.begin(last)
            cut = IndexCut(self.index(first, last) - a, None)
            whole = b - a == self.size
            yield Tile(
                weight if whole else flat_weight[a:b], grad if whole else flat_grad[a:b],
                cut, first, last - first, a,
            )  # fmt: skip

    def mask(self, rows: int, columns: int) -> Tensor:
        """Return which elements have state."""
        chosen = torch.zeros(rows * columns, dtype=torch.bool)
        chosen[self.index(0, self.count).cpu()] = True
        return chosen.view(rows, columns)

    def carry(self, old: Part, moment: Tensor, *, signed: bool) -> Tensor:
        """Keep the elements chosen in both rounds."""
        assert isinstance(old, Strata)
        new = moment.new_empty(self.count)
        for first in range(0, self.count, CARRIED):  # indices are 64-bit: not all of them at once
            last = min(self.count, first + CARRIED)
            low = old.stratum_of(self.begin(first))
            high = old.stratum_of(self.begin(last) - 1) + 1
            chosen, before = self.index(first, last), old.index(low, high)
            new[first:last] = carry_chosen(before, chosen, moment[low:high], 0)
        return new


class Coordinates(Selection):
    """One element of each stratum; see the module's text."""

    name = "coordinates"

    def num_slots(self, rows: int, columns: int, density: float) -> int:
        """floor(density * elements)."""
        return share(density, rows * columns)

    def choose(self, choice: Choice) -> Part:
        """Draw the strata of this round; all or none need no draw."""
        size = choice.rows * choice.columns
        count = share(choice.density, size)
        if count in (0, size):
            return LeadingRows(choice.rows if count else 0, choice.columns)
        if (count + 1) * size >= 2**63 or 2 * (size // count + 1) >= 2**31:
            raise ValueError(
                f"selection='coordinates' computes elements in 64 bits, which a tensor of {size} elements"
                f" at density {choice.density} exceeds (about 6 billion at 0.25): use blocks, columns or rows"
            )
        return Strata(choice.key, size, count, choice.device)

    def describe(self) -> str:
        """One line for tables."""
        return "floor(density x elements) computed elements of each tensor"
