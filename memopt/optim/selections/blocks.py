"""Whole tensors, by a budget of elements (FRUGAL's default; arXiv 2411.07837).

The reference code activates `round(density * number of tensors)` tensors, so its real density
drifts with the shapes that are drawn. Here the budget is floor(density * elements of the group):
tensors are taken in the round's order until one exceeds what is left; that one gives its first
rows. The state is therefore within one row of the budget in every round, and never above it.
"""

from __future__ import annotations

from collections.abc import Sequence

from memopt.ops.counter_rng import key_of
from memopt.optim.parts import LeadingRows, Part
from memopt.optim.selections.base import Choice, Selection
from memopt.optim.tensors import share


def block_order(
    names: Sequence[str], sizes: Sequence[int], budget: int, *, order: str, seed: int, round_: int
) -> list[int]:
    """Return the order in which tensors are offered state in a round.

    random: drawn anew each round. ascending, descending: round r starts at the tensor that holds
    element r * budget of the group (modulo its size), so that rounds sweep through the group.
    mirror: ascending sweeps alternate with descending ones.
    """
    count, total = len(names), sum(sizes)
    if order == "random":
        return sorted(range(count), key=lambda i: (key_of(seed, round_, names[i]), i))
    rounds_per_sweep = max(1, -(-total // max(1, budget)))
    backwards = order == "descending"
    if order == "mirror":
        backwards = (round_ // rounds_per_sweep) % 2 == 1
        round_ %= rounds_per_sweep
    sequence = list(range(count))
    if backwards:
        sequence.reverse()
    offset = (round_ * budget) % max(1, total)
    for first, tensor in enumerate(sequence):
        if offset < sizes[tensor]:
            return sequence[first:] + sequence[:first]
        offset -= sizes[tensor]
    return sequence


def fill_budget(
    sequence: Sequence[int], shapes: Sequence[tuple[int, int]], budget: int
) -> list[int]:
    """Return how many leading rows of each tensor get state."""
    full_rows = [0] * len(shapes)
    for tensor in sequence:
        rows, columns = shapes[tensor]
        size = rows * columns
        if size > budget:
            full_rows[tensor] = budget // columns
            break
        full_rows[tensor] = rows
        budget -= size
    return full_rows


class Blocks(Selection):
    """Whole tensors in an order drawn from (seed, round); see the module's text."""

    name = "blocks"
    pooled = True

    def num_slots(self, rows: int, columns: int, density: float) -> int:
        """One tensor's share of the budget (what it takes in a round is 0, all or a part)."""
        return share(density, rows * columns)

    def choose(self, choice: Choice) -> Part:
        """Choose for a group of this one tensor; groups of several call `fill_budget`."""
        budget = share(choice.density, choice.rows * choice.columns)
        return LeadingRows(budget // max(1, choice.columns), choice.columns)

    def describe(self) -> str:
        """One line for tables."""
        return "whole tensors, floor(density x elements of the group)"
