"""State-free rules: sign, sgd, column_normalized, none."""

from __future__ import annotations

import torch
from torch import Tensor

from memopt.ops.signs import sign
from memopt.optim.rules.base import StateFreeRule, Total, WholeRule

_NORM_FLOOR = (
    1e-8  # an all-zero column stays zero; no other norm of a training gradient is this small
)


class Sign(StateFreeRule):
    """signSGD (arXiv 1802.04434): `w -= lr sign(g)`; sign(0) = 0, sign(NaN) = NaN."""

    name = "sign"
    native_code = 0

    def direction(self, grads: list[Tensor]) -> list[Tensor] | None:
        """Return the signs."""
        return [sign(grad) for grad in grads]


class Sgd(StateFreeRule):
    """Plain SGD: `w -= lr g`."""

    name = "sgd"
    native_code = 1

    def direction(self, grads: list[Tensor]) -> list[Tensor] | None:
        """Return the gradients themselves."""
        return grads


class NoUpdate(StateFreeRule):
    """No update (weight decay still applies): the rest stays frozen in this round."""

    name = "none"
    native_code = 2

    def direction(self, grads: list[Tensor]) -> list[Tensor] | None:
        """Return nothing to add."""
        return None


def column_normalized(grad: Tensor, dim: int, total: Total | None = None) -> Tensor:
    """Divide by the Euclidean norm along `dim`; a vector by its own norm. Norms are float32.

    `total` is given where other ranks have rows of the same parameter: norms that run over rows
    (dim 0, and a vector's) are then summed over them.
    """
    dtype = torch.promote_types(grad.dtype, torch.float32)
    across = grad.dim() < 2 or dim == 0
    norm = torch.linalg.vector_norm(
        grad, dim=None if grad.dim() < 2 else dim, keepdim=True, dtype=dtype
    )
    if total is not None and across:
        norm = total(norm.square()).sqrt()
    unit: Tensor = grad / norm.clamp_min(_NORM_FLOOR).to(grad.dtype)
    return unit


class ColumnNormalized(WholeRule):
    """SCALE's normalisation (arXiv 2506.16659): `C(G)[:, j] = G[:, j] / ||G[:, j]||_2`.

    The paper writes a layer as (in, out) and normalises "along the output dimension": one norm for
    each output unit. In torch's (out, in) weight that is one norm for each row, over dim 1. The
    norm runs over the state-free elements only.
    """

    name = "column_normalized"

    def direction_of(self, grad: Tensor, total: Total | None) -> Tensor:
        """Return rows of unit norm."""
        return column_normalized(grad, 1, total)
