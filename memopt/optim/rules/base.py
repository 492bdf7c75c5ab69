"""The protocols of a state-full and a state-free rule.

Both work on lists of tiles (so that `torch._foreach_*` can take many at once) and hold no state
themselves: moments come in as tensors of the tile's size and are updated in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

# Sums a tensor over the ranks that have rows of the same parameter; takes part in a collective.
Total = Callable[[Tensor], Tensor]


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


class StateFreeRule(ABC):
    """An update without memory: `w -= lr * direction(g)`."""

    name: ClassVar[str]
    elementwise: ClassVar[bool] = True  # True: may see and ignore elements of the state-full part
    native_code: ClassVar[int] = -1

    @abstractmethod
    def direction(self, grads: list[Tensor]) -> list[Tensor] | None:
        """Return the direction of each tile (1-D tiles are vectors), or None for no update."""


class WholeRule(StateFreeRule):
    """A state-free rule that needs sums over rows, which may be on several ranks."""

    elementwise = False

    def direction(self, grads: list[Tensor]) -> list[Tensor] | None:
        """Return the directions of parameters that are not sharded."""
        return [self.direction_of(grad, None) for grad in grads]

    @abstractmethod
    def direction_of(self, grad: Tensor, total: Total | None) -> Tensor:
        """Return the direction of a parameter, or of this rank's rows, which may be none.

        `total` sums over the ranks; all of them must call it as often. None: nothing is sharded.
        """
