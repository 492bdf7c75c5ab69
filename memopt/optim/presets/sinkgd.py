"""SinkGD (arXiv 2502.06742): gradients whose rows and columns all have the same norm, no state.

    X = G (m, n);   L times:   X[i, :] <- sqrt(n) X[i, :] / ||X[i, :]||_2      every row, then
                               X[:, j] <- sqrt(m) X[:, j] / ||X[:, j]||_2      every column
    W <- W - lr alpha X

The paper's Algorithms 3 (SR-Sinkhorn) and 4. Linear weights are updated so, everything else by
AdamW. The mean square of X is 1, as a sign's; so its learning rate is a sign's, too.
A vector has rows of one element: its X is its sign. Norms are float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from memopt.ops.signs import sign
from memopt.optim.frugal import Frugal
from memopt.optim.groups import as_groups
from memopt.optim.rules import register_state_free
from memopt.optim.rules.base import Total, WholeRule

ITERATIONS = 5
_NORM_FLOOR = 1e-30  # only rows and columns of zeros stay as they are: scale does not matter here


class Sinkhorn(WholeRule):
    """The equations above; `iterations` is L."""

    def __init__(self, iterations: int = ITERATIONS) -> None:
        self.iterations = iterations
        self.name = "sinkhorn" if iterations == ITERATIONS else f"sinkhorn_{iterations}"  # type: ignore[misc]

    def direction_of(self, grad: Tensor, total: Total | None) -> Tensor:
        """Return X; ranks with rows of one matrix sum their columns' squares L times."""
        if grad.dim() < 2:
            return sign(grad)
        x = grad.to(torch.float32, copy=True)
        # Sums of squares of small gradients would vanish: bring the largest element to 1.
        largest = x.abs().amax() if x.numel() else x.new_zeros(())
        x.div_(largest.clamp_min(_NORM_FLOOR))
        rows = x.new_tensor([float(x.shape[0])])
        for _ in range(self.iterations):
            norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
            x.mul_(x.shape[1] ** 0.5 / norms.clamp_min(_NORM_FLOOR))
            sums = torch.cat([x.square().sum(dim=0), rows])
            if total is not None:
                sums = total(sums)
            x.mul_((sums[-1] / sums[:-1].clamp_min(_NORM_FLOOR)).sqrt())
        return x.to(grad.dtype)


register_state_free(Sinkhorn())


def sinkgd(
    groups: Iterable[Any],
    lr: float = 1e-3,
    *,
    alpha: float = 1.0,
    iterations: int = ITERATIONS,
    **settings: Any,
) -> Frugal:
    """Return SinkGD over the split groups of `frugal_groups`; other groups are AdamW.

    Args:
        groups: parameter groups, or parameters: one group, all of it split.
        lr: learning rate of all groups.
        alpha: factor on it for the normalised gradients.
        iterations: L.
        **settings: further arguments of `Frugal`.

    Raises:
        ValueError: for less than one iteration.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations} must be at least 1")
    rule = Sinkhorn(iterations)
    register_state_free(rule)
    chosen = [
        {**group, "density": 0.0} if group.get("split", True) else group
        for group in as_groups(groups)
    ]
    return Frugal(chosen, lr=lr, state_free=rule.name, state_free_lr_scale=alpha, **settings)
