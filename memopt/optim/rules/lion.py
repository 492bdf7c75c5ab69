"""Lion (arXiv 2302.06675): the sign of an interpolation, one moment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memopt.ops.signs import sign
from memopt.optim.rules.base import Hyper, Moment, StateFullRule


class Lion(StateFullRule):
    """`u = sign(b1 m + (1-b1) g); w -= lr u; m = b2 m + (1-b2) g`."""

    name = "lion"
    moments = (Moment("exp_avg", signed=True),)
    native_code = 1

    def update(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        moments: list[list[Tensor]],
        steps: Sequence[int],
        hyper: Hyper,
    ) -> None:
        """Update in place."""
        (means,) = moments
        directions = [sign(u) for u in torch._foreach_lerp(means, grads, 1 - hyper.beta1)]
        torch._foreach_add_(weights, directions, alpha=-hyper.lr)
        torch._foreach_lerp_(means, grads, 1 - hyper.beta2)
