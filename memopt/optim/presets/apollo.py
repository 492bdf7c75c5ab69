"""APOLLO (arXiv 2412.05270): a low-rank Adam says how far each channel of the gradient may go.

    every T steps:  P (r, n), entries N(0, 1/r), n the shorter side
    R = P G,        N = Adam(R) = m^ / (sqrt(v^) + eps)
    s[j] = |N[:, j]| / |R[:, j]|            one factor a channel (a column of R); or s = |N| / |R|
    if |G s|_t > gamma |G s|_t-1:  scale G s down to that;     W <- W - lr alpha G s

APOLLO scales by channel; APOLLO-Mini (`mini=True`) has rank 1 and one factor for the whole matrix.
Only the factors come from the subspace, so P needs no orthogonal rows. The paper draws P anew from its
seed in every step and keeps no matrix; here it is kept (rank x n numbers). Its published code takes
alpha = 1 for APOLLO and sqrt(128) for Mini, and tries up to sqrt(3) and sqrt(384) for longer contexts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from memopt.optim.frugal import Frugal
from memopt.optim.presets.galore import with_rank
from memopt.optim.rules import register_state_full
from memopt.optim.rules.base import Hyper
from memopt.optim.rules.joint import (
    LIMITER,
    NORM_FLOOR,
    Both,
    JointRule,
    adam_direction,
    growth_limit,
    line_factors,
)
from memopt.optim.selections import Choice, register_selection
from memopt.optim.selections.lowrank import LowRank

MINI_ALPHA = 128**0.5


class GaussianProjection(LowRank):
    """Independent Gaussian rows of variance 1/rank."""

    name = "gaussian"

    def right_basis(self, choice: Choice, rank: int, size: int, grad: Tensor | None) -> Tensor:
        """Draw from a generator of our own."""
        generator = torch.Generator(device=choice.device)
        generator.manual_seed(choice.key & (2**63 - 1))
        draw: Tensor = torch.randn(
            rank, size, generator=generator, dtype=torch.float32, device=choice.device
        )
        return draw.div_(rank**0.5)

    def describe(self) -> str:
        """One line for tables."""
        return "random Gaussian projection"


class ApolloRule(JointRule):
    """The equations above."""

    name = "apollo"
    memory = (LIMITER,)

    def update_both(self, both: Both, hyper: Hyper, free_lr: float) -> None:
        """Update in place."""
        inside = both.cut.gather(both.grad)
        direction = adam_direction(inside, both.moments, both.step, hyper)
        scaled, norm = self.scaled(both, inside, direction)
        factor = growth_limit(norm, both.memory[LIMITER])
        both.weight.add_(scaled.mul_(factor), alpha=-hyper.lr)

    def scaled(self, both: Both, inside: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Return G s, a tensor of its own, and the norm of the whole matrix's."""
        scaled = both.grad * line_factors(direction, inside)
        return scaled, both.whole_norms(scaled)


class ApolloMiniRule(ApolloRule):
    """One factor a matrix."""

    name = "apollo_mini"

    def scaled(self, both: Both, inside: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Return G s and its norm, |G| s."""
        of_direction, of_inside, of_grad = both.whole_norms(direction, inside, both.grad)
        factor = of_direction / (of_inside + NORM_FLOOR)
        return both.grad * factor, of_grad * factor


register_selection(GaussianProjection())
register_state_full(ApolloRule())
register_state_full(ApolloMiniRule())


def apollo(
    groups: Iterable[Any],
    lr: float = 0.01,
    *,
    rank: int | None = None,
    mini: bool = False,
    update_gap: int = 200,
    alpha: float | None = None,
    **settings: Any,
) -> Frugal:
    """Return APOLLO, or APOLLO-Mini, over the groups of `frugal_groups`; other groups are AdamW.

    Args:
        groups: parameter groups, or parameters: one group, all of it split.
        lr: learning rate (the paper's: 0.01).
        rank: the same for all matrices; None takes `density` of the groups, or 1 for Mini.
        mini: one factor a matrix.
        update_gap: steps between draws of the projection.
        alpha: scale of the update; None takes 1, or sqrt(128) for Mini.
        **settings: further arguments of `Frugal`.

    Raises:
        ValueError: for a rank of a matrix's shorter side or more.
    """
    rule = ApolloMiniRule.name if mini else ApolloRule.name
    if alpha is None:
        alpha = MINI_ALPHA if mini else 1.0
    chosen = [
        {**group, "state_full": rule} if group.get("split", True) else group
        for group in with_rank(groups, 1 if mini and rank is None else rank)
    ]
    return Frugal(
        chosen, lr=lr, update_gap=update_gap, selection=GaussianProjection.name,
        state_free="none", state_full_lr_scale=alpha, on_switch="keep", **settings,
    )  # fmt: skip
