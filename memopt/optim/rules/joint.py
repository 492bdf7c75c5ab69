"""Rules that need both parts of a matrix at once (Fira, APOLLO).

Such a rule is Adam in the subspace, and something outside of it that depends on what Adam did there.
What both published ones share is here: Adam's direction, and the limiter of the update's growth.
Where rows of a matrix are on several ranks, lines of the projected gradient are whole on each of
them; norms of whole matrices are put together by `Both.whole_norms`, with one sum over the ranks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from memopt.optim.parts import Cut
from memopt.optim.rules.adamw import AdamW
from memopt.optim.rules.base import Hyper, Total

GAMMA = 1.01  # of Fira, which APOLLO took over
LIMITER = "limiter_norm"
NORM_FLOOR = 1e-8  # as in the published codes: a line without gradient is not scaled


@dataclass(frozen=True, kw_only=True)
class Both:
    """A matrix with its subspace: what a `JointRule` sees, the longer side as rows.

    `weight` is decayed and updated in place; `cut` gathers the gradient's coordinates, takes its
    complement and puts an update of coordinates back; `moments` have the coordinates' shape;
    `memory` holds one number a name, float32 of shape (1,); `step` counts updates since a reset.
    Of a sharded matrix these are this rank's rows, and `total` sums over the ranks.
    """

    weight: Tensor
    grad: Tensor
    cut: Cut
    moments: list[Tensor]
    memory: dict[str, Tensor]
    step: int
    total: Total | None

    def whole_norms(self, *parts: Tensor) -> Tensor:
        """Return the Euclidean norms of whole matrices of which this rank has `parts`, float32."""
        norms = torch.stack([torch.linalg.vector_norm(x, dtype=torch.float32) for x in parts])
        return norms if self.total is None else self.total(norms.square()).sqrt()


class JointRule(AdamW):
    """A rule whose state-free update depends on the state-full one.

    It replaces both rules where the selection is a subspace. Elsewhere (vectors) it is AdamW, beside
    the group's state-free rule.
    """

    elementwise = False
    native_code = -1
    memory: ClassVar[tuple[str, ...]] = ()  # numbers kept for every matrix, in its state

    @abstractmethod
    def update_both(self, both: Both, hyper: Hyper, free_lr: float) -> None:
        """Update weight, moments and memory in place; `free_lr` is the state-free part's rate."""


def adam_direction(grad: Tensor, moments: Sequence[Tensor], step: int, hyper: Hyper) -> Tensor:
    """Update Adam's moments in place; return `m^ / (sqrt(v^) + eps)`."""
    mean, square = moments
    mean.lerp_(grad, 1 - hyper.beta1)
    square.mul_(hyper.beta2).addcmul_(grad, grad, value=1 - hyper.beta2)
    denominator = (square / (1 - hyper.beta2**step)).sqrt_().add_(hyper.eps)
    direction: Tensor = mean / denominator / (1 - hyper.beta1**step)
    return direction


def line_factors(direction: Tensor, grad: Tensor) -> Tensor:
    """Return |direction| / |grad| of each line of the longer side, as a column."""
    norms = [torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (direction, grad)]
    factors: Tensor = norms[0] / (norms[1] + NORM_FLOOR)
    return factors


def growth_limit(norm: Tensor, last_norm: Tensor) -> Tensor:
    """Return the factor, of shape (1,), that keeps an update of this norm below GAMMA times the last.

    `last_norm` becomes the norm of the update that is left.
    """
    norm = norm.view(1)
    allowed = torch.where(last_norm > 0, GAMMA * last_norm, norm)
    factor = (allowed / norm.clamp_min(NORM_FLOOR)).clamp_max(1.0)
    last_norm.copy_(norm * factor)
    return factor
