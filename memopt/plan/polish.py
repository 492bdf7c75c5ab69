"""Local improvement of a filled plan: single placements raised, moved to another medium, or swapped.

`fill` decides kind by kind. What it leaves is rounding: a tensor that no longer fits where a smaller one would, a
region whose link is idle while its neighbour waits, a region with so little left to recompute that running it
untouched costs no byte more. Each move here is one simulation and is kept only if the step gets shorter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from memopt.plan.cost import Choice, everything_again
from memopt.plan.greedy import Search, placed
from memopt.plan.smallest import Candidate
from memopt.types.plan import Placement


def polish(search: Search, best: Candidate) -> Candidate:
    """Return `best` after all single moves that shorten the step, while simulations are left."""
    improved = True
    while improved and not search.spent():
        improved = False
        for move in (raises, untouched, exchanges):
            for choices in move(search, best):
                if search.spent():
                    return best
                found = search.evaluate(choices, best.settings)
                if found is not None and found.timeline.step_s < best.timeline.step_s * (
                    1.0 - 1e-9
                ):
                    best, improved = found, True
                    break
    return best


def raises(search: Search, best: Candidate) -> Iterator[list[Choice]]:
    """Store one more output."""
    for item in search.items:
        for k in reversed(item.regions):
            if not best.choices[k].plain and best.choices[k].ops[item.index] == "recompute":
                for where in ("device", *search.media):
                    yield placed(best.choices, [k], item.index, where)


def untouched(search: Search, best: Candidate) -> Iterator[list[Choice]]:
    """Run one more region untouched."""
    for k in range(len(best.choices) - 1, -1, -1):
        if not best.choices[k].plain:
            changed = list(best.choices)
            changed[k] = everything_again(len(changed[k].ops), plain=True)
            yield changed


def exchanges(search: Search, best: Candidate) -> Iterator[list[Choice]]:
    """Give up one output of little worth for one of more, or trade media between two regions."""
    stored = [
        (item, k, best.choices[k].ops[item.index])
        for item in reversed(search.items)
        for k in item.regions
        if not best.choices[k].plain and best.choices[k].ops[item.index] != "recompute"
    ]
    for item in search.items:
        for k in item.regions:
            if best.choices[k].plain or best.choices[k].ops[item.index] != "recompute":
                continue
            for other, j, where in stored:
                if other.gain_s < item.gain_s:
                    dropped = placed(best.choices, [j], other.index, "recompute")
                    yield placed(dropped, [k], item.index, where)
    media: tuple[Placement, ...] = ("device", *search.media)
    for item, k, where in stored:
        for other_where in media:
            if other_where != where:
                yield placed(best.choices, [k], item.index, other_where)
    for k, choice in enumerate(best.choices):
        for other_where in media:
            if not choice.plain and choice.input != other_where:
                changed = list(best.choices)
                changed[k] = replace(choice, input=other_where)
                yield changed
