"""Fira (arXiv 2410.01623): Adam in a subspace, and the rest of the gradient at Adam's scale.

    every T steps:  P = the first r singular vectors of G
    R = P^T G,      N = Adam(R) = m^ / (sqrt(v^) + eps),      S = G - P R
    phi(S)[:, i] = |N[:, i]| / |R[:, i]| S[:, i]              one factor a column of R
    if |phi(S_t)| > gamma |phi(S_t-1)|:  phi(S_t) <- gamma |phi(S_t-1)| phi(S_t) / |phi(S_t)|
    W <- W - lr alpha (P N + phi(S))

The last two norms are over the matrix; the limiter's one number is kept in the state. Columns of R
run over the longer side of the weight. The moments stay as they are when P changes, as in GaLore,
whose groups and rank this takes. (The published code limits phi before the bias correction of N,
which differs in the first steps only.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from memopt.optim.frugal import Frugal
from memopt.optim.presets.galore import with_rank
from memopt.optim.rules import register_state_full
from memopt.optim.rules.base import Hyper
from memopt.optim.rules.joint import (
    LIMITER,
    Both,
    JointRule,
    adam_direction,
    growth_limit,
    line_factors,
)


class FiraRule(JointRule):
    """The equations above."""

    name = "fira"
    memory = (LIMITER,)

    def update_both(self, both: Both, hyper: Hyper, free_lr: float) -> None:
        """Update in place."""
        inside = both.cut.gather(both.grad)
        direction = adam_direction(inside, both.moments, both.step, hyper)
        scaled = both.cut.complement(both.grad).mul_(line_factors(direction, inside))
        factor = growth_limit(both.whole_norms(scaled), both.memory[LIMITER])
        both.weight.add_(scaled.mul_(factor), alpha=-free_lr)
        both.cut.put(both.weight, direction.mul_(-hyper.lr))


register_state_full(FiraRule())


def fira(
    groups: Iterable[Any],
    lr: float = 0.01,
    *,
    rank: int | None = None,
    update_gap: int = 200,
    alpha: float = 0.25,
    **settings: Any,
) -> Frugal:
    """Return Fira over the groups of `frugal_groups`; other groups are AdamW.

    Args:
        groups: parameter groups, or parameters: one group, all of it split.
        lr: learning rate (the paper's: 0.01).
        rank: the same for all matrices; None takes `density` of the groups.
        update_gap: steps between decompositions.
        alpha: the scale of the whole update.
        **settings: further arguments of `Frugal`.

    Raises:
        ValueError: for a rank of a matrix's shorter side or more.
    """
    chosen = [
        {**group, "state_full": FiraRule.name} if group.get("split", True) else group
        for group in with_rank(groups, rank)
    ]
    return Frugal(
        chosen, lr=lr, update_gap=update_gap, selection="svd", state_free="none",
        state_full_lr_scale=alpha, state_free_lr_scale=alpha, on_switch="keep", **settings,
    )  # fmt: skip
