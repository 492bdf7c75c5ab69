"""SCALE (arXiv 2506.16659): column-normalised SGD, with momentum on the last layer only.

    m_t = beta m_{t-1} + (1 - beta) g_t   for the output head;   m_t = g_t   for every other matrix
    W <- W - lr C(m_t),    C(G)[:, j] = G[:, j] / ||G[:, j]||_2

The paper writes layers as (in, out) and normalises along the output dimension: one norm for each
output unit. That is over dim 1 of torch's (out, in) linear weights, and over dim 0 of embeddings
and of GPT-2's Conv1D, which are stored as (in, out). Vectors are AdamW, as in the paper. (The authors' published code
divides by the root mean square instead of the norm: a factor sqrt(length) in the learning rate.)
This file is also the example of a new method: two rules, one function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memopt.optim.frugal import Frugal
from memopt.optim.groups import frugal_groups
from memopt.optim.rules import register_state_free, register_state_full
from memopt.optim.rules.base import Hyper, Moment, StateFullRule, Total, WholeRule
from memopt.optim.rules.free import column_normalized

TRANSPOSED = "linear stored as (in, out)"


class NormalizedMomentum(StateFullRule):
    """`m = b1 m + (1 - b1) g; w -= lr C(m)`."""

    name = "normalized_momentum"
    moments = (Moment("exp_avg", signed=True),)
    elementwise = False

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
        torch._foreach_lerp_(means, grads, 1 - hyper.beta1)
        directions = [column_normalized(mean, dim=1) for mean in means]
        torch._foreach_add_(weights, directions, alpha=-hyper.lr)


class EmbeddingNormalized(WholeRule):
    """C for an embedding's (in, out) weight."""

    name = "embedding_normalized"

    def direction_of(self, grad: Tensor, total: Total | None) -> Tensor:
        """Return columns of unit norm."""
        return column_normalized(grad, 0, total)


register_state_full(NormalizedMomentum())
register_state_free(EmbeddingNormalized())


def scale(
    model: nn.Module,
    lr: float = 1e-3,
    *,
    momentum: float = 0.9,
    adam_lr: float | None = None,
    **settings: Any,
) -> Frugal:
    """Return SCALE for a model: head with momentum, other matrices without, vectors AdamW.

    Args:
        model: any module; roles are those of `frugal_groups`.
        lr: of all matrices.
        momentum: beta of the head.
        adam_lr: of vectors (norms, biases); default `lr`.
        **settings: further arguments of `Frugal`.
    """
    found = frugal_groups(model)
    roles = {assignment.name: assignment.role for assignment in found.assignments}
    by_role: dict[str, list[tuple[str, Tensor]]] = {}
    transposed = {id(m.weight) for m in model.modules() if type(m).__name__ == "Conv1D"}
    for name, param in model.named_parameters():
        if param.requires_grad:
            role = TRANSPOSED if id(param) in transposed else roles[name]
            by_role.setdefault(role, []).append((name, param))
    free = {"density": 0.0, "state_free": "column_normalized"}
    vectors = {"split": False, "lr": lr if adam_lr is None else adam_lr}
    head = {"split": False, "state_full": NormalizedMomentum.name, "betas": (momentum, 0.999)}
    kinds: dict[str, dict[str, Any]] = {
        "linear in a block": free,
        TRANSPOSED: {**free, "state_free": EmbeddingNormalized.name},
        "embedding": {**free, "state_free": EmbeddingNormalized.name},
        "output head or other": head,
        "bias": vectors,
        "norm or vector": vectors,
    }
    if "output head or other" not in by_role:  # tied to the embedding: momentum, per output unit
        kinds["embedding"] = head
    groups = [{"params": params, **kinds[role]} for role, params in by_role.items()]
    return Frugal(groups, lr=lr, **settings)
