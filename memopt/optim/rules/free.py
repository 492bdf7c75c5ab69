"""State-free rules: sign, sgd, column_normalized, none."""

from __future__ import annotations

import torch
from torch import Tensor

from memopt.ops.signs import sign
from memopt.optim.rules.base import StateFreeRule

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


def column_normalized(grad: Tensor, dim: int) -> Tensor:
    """Divide by the Euclidean norm along `dim`; a vector by its own norm. Norms are float32."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    if grad.dim() < 2:
        norm = torch.linalg.vector_norm(grad, dtype=dtype)
    else:
        norm = torch.linalg.vector_norm(grad, dim=dim, keepdim=True, dtype=dtype)
    unit: Tensor = grad / norm.clamp_min(_NORM_FLOOR).to(grad.dtype)
    return unit


class ColumnNormalized(StateFreeRule):
    """SCALE's normalisation (arXiv 2506.16659): `C(G)[:, j] = G[:, j] / ||G[:, j]||_2`.

    The paper writes a layer as (in, out) and normalises "along the output dimension": one norm for
    each output unit. In torch's (out, in) weight that is one norm for each row, over dim 1. The
    norm runs over the state-free elements only.
    """

    name = "column_normalized"
    elementwise = False

    def direction(self, grads: list[Tensor]) -> list[Tensor] | None:
        """Return rows of unit norm."""
        return [column_normalized(grad, dim=1) for grad in grads]
