"""Local improvement of a filled plan: single placements raised, moved to another medium, or swapped.

`fill` decides kind by kind. What it leaves is rounding: a tensor that no longer fits where a smaller one would, a
region whose link is idle while its neighbour waits, a region with so little left to recompute that running it
untouched costs no byte more. Each move here is one simulation and is kept only if the step gets shorter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from memopt.plan.cost import Choice, everything_again
from memopt.plan.greedy import Item, Search, placed
from memopt.plan.smallest import Candidate
from memopt.types.plan import Placement


@dataclass(frozen=True, slots=True)
class Move:
    """Store `item` of region `k` at `where`; None as item: its input, or (where None) run it untouched."""

    k: int
    where: Placement | None
    item: Item | None = None

    def apply(self, choices: Sequence[Choice]) -> list[Choice] | None:
        """Return the changed choices; None where the move changes nothing or makes no sense any more."""
        choice = choices[self.k]
        if choice.plain:
            return None
        if self.item is not None:
            assert self.where is not None
            if choice.ops[self.item.index] == self.where:
                return None
            return placed(choices, [self.k], self.item.index, self.where)
        changed = list(choices)
        if self.where is None:
            changed[self.k] = everything_again(len(choice.ops), plain=True)
        elif self.where == choice.input:
            return None
        else:
            changed[self.k] = replace(choice, input=self.where)
        return changed


def polish(search: Search, best: Candidate) -> Candidate:
    """Return `best` after all single moves and swaps that shorten the step, while simulations are left."""
    improved = True
    while improved and not search.spent():
        before = best.timeline.step_s
        for moves in (
            raises(search, best),
            untouched(best),
            others(search, best),
            exchanges(search, best),
        ):
            best = take(search, best, moves)
        improved = best.timeline.step_s < before
    return simplest(search, best)


def simplest(search: Search, best: Candidate) -> Candidate:
    """Return `best` with every region untouched that is no slower so: it is then exactly the user's own."""
    for (move,) in untouched(best):
        choices = move.apply(best.choices)
        found = search.evaluate(choices, best.settings) if choices is not None else None
        if found is not None and found.timeline.step_s <= best.timeline.step_s:
            best = found
    return best


def take(search: Search, best: Candidate, moves: Iterator[tuple[Move, ...]]) -> Candidate:
    """Return `best` after each of the given sets of moves that shortens the step, tried in turn."""
    for together in moves:
        if search.spent():
            break
        choices: list[Choice] | None = list(best.choices)
        for move in together:
            choices = move.apply(choices) if choices is not None else None
        found = search.evaluate(choices, best.settings) if choices is not None else None
        if found is not None and found.timeline.step_s < best.timeline.step_s * (1.0 - 1e-9):
            best = found
    return best


def media(search: Search, item: Item | None = None) -> tuple[Placement, ...]:
    """Return where an item may be stored, the device first."""
    away = [w for w in search.media if item is None or search.may_move(item, w)]
    return ("device", *away)


def raises(search: Search, best: Candidate) -> Iterator[tuple[Move, ...]]:
    """Store one more output."""
    for item in search.items:
        for k in reversed(item.regions):
            if best.choices[k].ops[item.index] == "recompute":
                yield from ((Move(k, where, item),) for where in media(search, item))


def untouched(best: Candidate) -> Iterator[tuple[Move, ...]]:
    """Run one more region untouched."""
    yield from ((Move(k, None),) for k in reversed(range(len(best.choices))))


def others(search: Search, best: Candidate) -> Iterator[tuple[Move, ...]]:
    """Store an output, or an input, somewhere else."""
    for item in search.items:
        for k in item.regions:
            if best.choices[k].ops[item.index] != "recompute":
                yield from ((Move(k, where, item),) for where in media(search, item))
    for k in range(len(best.choices)):
        yield from ((Move(k, where),) for where in media(search))


def exchanges(search: Search, best: Candidate) -> Iterator[tuple[Move, ...]]:
    """Give up one output for another of more worth, at the place of the first."""
    stored = [
        (item, k, best.choices[k].ops[item.index])
        for item in reversed(search.items)
        for k in item.regions
        if best.choices[k].ops[item.index] != "recompute"
    ]
    for item in search.items:
        for k in item.regions:
            if best.choices[k].ops[item.index] != "recompute":
                continue
            for other, j, where in stored:
                if other.gain_s < item.gain_s and where in media(search, item):
                    yield (Move(j, "recompute", other), Move(k, where, item))
