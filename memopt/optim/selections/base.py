"""The protocol of a selection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from memopt.ops.counter_rng import key_of
from memopt.optim.parts import Part


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a selection may look at. `grad` is given to selections with `needs_grad` only."""

    seed: int
    round: int
    name: str
    rows: int
    columns: int
    density: float
    device: torch.device
    grad: Tensor | None = None
    exact_complement: bool = True

    def in_round(self, round_: int) -> Choice:
        """Return the same choice for another round.

        This is `dataclasses.replace`, which checks every field, without its 3 us: a switch needs
        one for every parameter.
        """
        other = object.__new__(type(self))
        vars(other).update(vars(self), round=round_)
        return other

    @property
    def key(self) -> int:
        """The 64-bit key of (seed, round, parameter name)."""
        return key_of(self.seed, self.round, self.name)


class Selection(ABC):
    """Chooses, for one parameter and one round, the part that has state.

    A pure function of the `Choice`; never of a global random generator.
    """

    name: ClassVar[str]
    needs_matrix: ClassVar[bool] = False
    needs_grad: ClassVar[bool] = False
    pooled: ClassVar[bool] = False  # True: one budget for the group (see blocks.py)
    low_rank: ClassVar[bool] = False

    @abstractmethod
    def num_slots(self, rows: int, columns: int, density: float) -> int:
        """Numbers of each moment that a (rows, columns) parameter keeps."""

    @abstractmethod
    def choose(self, choice: Choice) -> Part:
        """Return the part of this round."""

    def choose_many(self, choices: Sequence[Choice]) -> list[Part]:
        """Return the parts of several parameters; override it where they can share work."""
        return [self.choose(choice) for choice in choices]

    def num_basis(self, rows: int, columns: int, density: float) -> int:
        """Numbers that the projection itself needs, in the parameter's dtype."""
        return 0

    def state_bytes(
        self, rows: int, columns: int, density: float, *, moment_bytes: float, basis_bytes: int
    ) -> float:
        """Bytes of state; `moment_bytes` is that of all moments of one number (AdamW fp32: 8)."""
        moments = self.num_slots(rows, columns, density) * moment_bytes
        return moments + self.num_basis(rows, columns, density) * basis_bytes

    @abstractmethod
    def describe(self) -> str:
        """One line for tables."""
