"""The protocols of a state-full and a state-free rule.

Both work on lists of tiles (so that `torch._foreach_*` can take many at once) and hold no state
themselves: moments come in as tensors of the tile's size and are updated in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from memopt.optim.parts import Cut


@dataclass(frozen=True)
class Moment:
    """One state tensor of a rule. Unsigned moments (of squares) are never negative."""

    name: str
    signed: bool


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """Numbers a rule may use; `lr` already carries the part's scale."""

    lr: float
    beta1: float
    beta2: float
    eps: float


class StateFullRule(ABC):
    """An update with moments."""

    name: ClassVar[str]
    moments: ClassVar[tuple[Moment, ...]]
    elementwise: ClassVar[bool] = True  # False: tiles are whole tensors
    native_code: ClassVar[int] = -1  # the kernel's number for it; -1: PyTorch only

    @abstractmethod
    def update(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        moments: list[list[Tensor]],
        steps: Sequence[int],
        hyper: Hyper,
    ) -> None:
        """Update weights and moments in place.

        Args:
            weights: decayed weights of the tiles.
            grads: their gradients, not to be changed.
            moments: for every moment of `self.moments`, one tensor a tile.
            steps: for every tile, the number of this update since its state was new: 1, 2 ...
            hyper: learning rate and the like.
        """


@dataclass(frozen=True, kw_only=True)
class Both:
    """A matrix with its subspace: what a `JointRule` sees, the longer side as rows.

    `weight` is decayed and updated in place; `cut` gathers the gradient's coordinates, takes its
    complement and puts an update of coordinates back; `moments` have the coordinates' shape;
    `memory` holds one number a name, float32 of shape (1,); `step` counts updates since a reset.
    """

    weight: Tensor
    grad: Tensor
    cut: Cut
    moments: list[Tensor]
    memory: dict[str, Tensor]
    step: int


class JointRule(StateFullRule):
    """A rule whose state-free update depends on the state-full one (Fira, APOLLO).

    It replaces both rules where the selection is a subspace. Elsewhere (vectors) `update` is used,
    and the group's state-free rule.
    """

    elementwise = False
    memory: ClassVar[tuple[str, ...]] = ()  # numbers kept for every matrix, in its state

    @abstractmethod
    def update_both(self, both: Both, hyper: Hyper, free_lr: float) -> None:
        """Update weight, moments and memory in place; `free_lr` is the state-free part's rate."""


class StateFreeRule(ABC):
    """An update without memory: `w -= lr * direction(g)`."""

    name: ClassVar[str]
    elementwise: ClassVar[bool] = True  # True: may see and ignore elements of the state-full part
    native_code: ClassVar[int] = -1

    @abstractmethod
    def direction(self, grads: list[Tensor]) -> list[Tensor] | None:
        """Return the direction of each tile (1-D tiles are vectors), or None for no update."""
