"""SGD with heavy-ball momentum that starts at 0 (the reference starts it at the first gradient)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memopt.optim.rules.base import Hyper, Moment, StateFullRule


class Sgdm(StateFullRule):
    """`m = b1 m + g; w -= lr m`."""

    name = "sgdm"
    moments = (Moment("momentum_buffer", signed=True),)
    native_code = 2

    def update(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        moments: list[list[Tensor]],
        steps: Sequence[int],
        hyper: Hyper,
    ) -> None:
        """Update in place."""
        (buffers,) = moments
        torch._foreach_mul_(buffers, hyper.beta1)
        torch._foreach_add_(buffers, grads)
        torch._foreach_add_(weights, buffers, alpha=-hyper.lr)
