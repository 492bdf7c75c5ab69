"""AdamW (arXiv 1711.05101), in the operation order of `torch.optim.AdamW(foreach=True)`.

The order is kept to the bit: a split optimizer of density 1 is AdamW. Weight decay is not here:
`Frugal` applies it to the whole tensor first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memopt.optim.rules.base import Hyper, Moment, StateFullRule


class AdamW(StateFullRule):
    """`m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2; w -= lr m^ / (sqrt(v^) + eps)`."""

    name = "adamw"
    moments = (Moment("exp_avg", signed=True), Moment("exp_avg_sq", signed=False))
    native_code = 0

    def update(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        moments: list[list[Tensor]],
        steps: Sequence[int],
        hyper: Hyper,
    ) -> None:
        """Update in place."""
        means, squares = moments
        torch._foreach_lerp_(means, grads, 1 - hyper.beta1)
        torch._foreach_mul_(squares, hyper.beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - hyper.beta2)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, [(1 - hyper.beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(denominators, hyper.eps)
        sizes = [-(hyper.lr / (1 - hyper.beta1**step)) for step in steps]
        torch._foreach_addcdiv_(weights, means, denominators, sizes)
