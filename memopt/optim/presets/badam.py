"""BAdam (arXiv 2404.02827): Adam on one block at a time, the others rest.

    for each block i of a sweep:  m = v = 0;  K steps of bias-corrected Adam on block i alone

A block is the paper's: one transformer layer. Here the budget of `blocks` is one layer's elements,
and the order sweeps through the tensors, so that a round's tensors are exactly one layer (where all
layers have the same elements). Embeddings and the head are frozen unless given to another group.
A weight decay is applied to all blocks in every step; the paper's code freezes those that rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from memopt.optim.frugal import Frugal
from memopt.optim.groups import as_groups


def badam(
    groups: Iterable[Any],
    lr: float = 1e-3,
    *,
    num_blocks: int,
    switch_every: int = 100,
    order: str = "ascending",
    **settings: Any,
) -> Frugal:
    """Return BAdam over the split groups of `frugal_groups`; other groups stay AdamW.

    Args:
        groups: parameter groups with the layers' tensors in the model's order.
        lr: learning rate.
        num_blocks: D, the number of layers; the state is 1/D of the group's.
        switch_every: K, steps on a block.
        order: "ascending", "descending" or "random" (the last draws tensors, not layers).
        **settings: further arguments of `Frugal`.

    Raises:
        ValueError: for fewer than one block.
    """
    if num_blocks < 1:
        raise ValueError(f"num_blocks={num_blocks} must be at least 1")
    chosen = [
        {**group, "density": 1.0 / num_blocks} if group.get("split", True) else group
        for group in as_groups(groups)
    ]
    return Frugal(
        chosen, lr=lr, update_gap=switch_every, selection="blocks", order=order,
        state_free="none", on_switch="reset", **settings,
    )  # fmt: skip
