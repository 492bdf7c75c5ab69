"""GaLore (arXiv 2403.03507): Adam in a subspace of the gradient, nothing outside of it.

    every T steps:  P = the first r singular vectors of G (right ones if out >= in, else left ones)
    R = P^T G,      m, v, N = Adam(R),      W <- W - lr alpha P N

The moments are kept as they are when P changes (`on_switch="keep"`), which is what the paper's
algorithm and code do. Embeddings, norms and the head are AdamW at the full learning rate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from memopt.optim.frugal import Frugal
from memopt.optim.groups import as_groups
from memopt.optim.tensors import matrix_shape


def galore(
    groups: Iterable[Any],
    lr: float = 0.01,
    *,
    rank: int | None = None,
    update_gap: int = 200,
    alpha: float = 0.25,
    **settings: Any,
) -> Frugal:
    """Return GaLore over the groups of `frugal_groups`.

    Args:
        groups: parameter groups, or parameters (all split); groups with `split=False` are AdamW.
        lr: learning rate (the paper's: 0.01).
        rank: the same for all matrices; None takes `density` of the groups.
        update_gap: steps between decompositions.
        alpha: the paper's scale of the projected update.
        **settings: further arguments of `Frugal`.

    Raises:
        ValueError: for a rank of a matrix's shorter side or more.
    """
    return Frugal(
        with_rank(groups, rank), lr=lr, update_gap=update_gap, selection="svd", state_free="none",
        state_full_lr_scale=alpha, on_switch="keep", **settings,
    )  # fmt: skip


def with_rank(groups: Iterable[Any], rank: int | None) -> list[dict[str, Any]]:
    """Give split groups the density that makes every matrix's rank `rank` (None: as they are).

    Raises:
        ValueError: for a rank of a matrix's shorter side or more.
    """
    chosen = []
    for group in as_groups(groups):
        if rank is None or not group.get("split", True):
            chosen.append(group)
            continue
        for side, params in _by_short_side(group["params"]).items():
            if rank >= side:
                raise ValueError(f"rank={rank} needs matrices with sides above it; one has {side}")
            chosen.append({**group, "params": params, "density": rank / side})
    return chosen


def _by_short_side(params: Iterable[Any]) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = defaultdict(list)
    for item in params:
        param: Tensor = item[1] if isinstance(item, tuple) else item
        found[min(matrix_shape(param.shape))].append(item)
    return found
