"""Low-rank subspaces: singular vectors of the gradient, or a random orthonormal basis.

rank = round(density * min(shape)); the right basis if out >= in, else the left one, so that the
projection has rank * min(shape) numbers. The left basis is the right basis of the transpose: the
part works on a transposed view and knows one case only.
`svd` is that of the float32 gradient of the switch step (as in GaLore, arXiv 2403.03507);
`random` orthonormalises Gaussian vectors drawn from (seed, round, name).

A matrix whose rows are on several ranks always takes the right basis (`ShardedRows`): each rank
projects its own rows, nothing is communicated between switches. A left basis would need a sum over
ranks in every step. At a switch svd gathers the gradient, once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from memopt.optim.parts import BasisCut, LeadingRows, Part, Tile, ranges, rows_per_tile
from memopt.optim.selections.base import Choice, Selection


@dataclass(frozen=True)
class Subspace(Part):
    """The span of `basis` (rank, shorter side); `left` works on the transposed matrix."""

    basis: Tensor
    long_side: int
    left: bool
    exact: bool

    @property
    def num_slots(self) -> int:  # type: ignore[override]
        """Numbers with state: rank for every line of the longer side."""
        return self.basis.shape[0] * self.long_side

    def tiles(self, weight: Tensor, grad: Tensor, limit: int | None, align: int) -> Iterator[Tile]:
        """Cut along the longer side."""
        if self.left:
            weight, grad = weight.T, grad.T
        rank, columns = self.basis.shape
        cut = BasisCut(self.basis, self.exact)
        for a, b in ranges(self.long_side, rows_per_tile(limit, columns, rank, align)):
            yield Tile(weight[a:b], grad[a:b], cut, a * rank, (b - a) * rank, a * columns)

    def mask(self, rows: int, columns: int) -> Tensor:
        """A subspace has no elements of its own."""
        raise ValueError("svd and random select a subspace, not elements: there is no mask")

    def carry(self, old: Part, moment: Tensor, *, signed: bool) -> Tensor:
        """Rotate: m' = R m; second moments by R∘R, since R would make them negative."""
        assert isinstance(old, Subspace)
        rotation = self.basis.to(moment.dtype) @ old.basis.to(moment.dtype).T
        if not signed:
            rotation = rotation.square()
        return (moment.view(self.long_side, -1) @ rotation.T).reshape(-1)


class LowRank(Selection):
    """What both selections share."""

    needs_matrix = True
    low_rank = True

    def rank(self, rows: int, columns: int, density: float) -> int:
        """round(density * min(shape))."""
        return min(round(density * min(rows, columns)), rows, columns)

    def num_slots(self, rows: int, columns: int, density: float) -> int:
        """Rank times the longer side."""
        return self.rank(rows, columns, density) * max(rows, columns)

    def num_basis(self, rows: int, columns: int, density: float) -> int:
        """Rank times the shorter side."""
        return self.rank(rows, columns, density) * min(rows, columns)

    def choose(self, choice: Choice) -> Part:
        """Make the basis of this round."""
        rank = self.rank(choice.rows, choice.columns, choice.density)
        if rank == 0:
            return LeadingRows(0, choice.columns)
        return self.part_of(self.basis(choice, rank), choice)

    def part_of(self, basis: Tensor, choice: Choice) -> Part:
        """Return the part of a basis that is already known (after a resume)."""
        return Subspace(
            basis,
            max(choice.rows, choice.columns),
            choice.rows < choice.columns,
            choice.exact_complement,
        )

    def basis(self, choice: Choice, rank: int) -> Tensor:
        """Return (rank, shorter side) rows, float32."""
        grad = choice.grad
        if grad is not None and choice.rows < choice.columns:
            grad = grad.T
        return self.right_basis(choice, rank, min(choice.rows, choice.columns), grad)

    @abstractmethod
    def right_basis(self, choice: Choice, rank: int, size: int, grad: Tensor | None) -> Tensor:
        """Return (rank, size) rows for a matrix of `size` columns; `grad` has as many."""


class SingularBasis(LowRank):
    """The gradient's leading singular vectors."""

    name = "svd"
    needs_grad = True

    def right_basis(self, choice: Choice, rank: int, size: int, grad: Tensor | None) -> Tensor:
        """Decompose the float32 gradient G by the eigenvectors of G^T G in float64.

        Squaring in float64 resolves singular values down to 1e-8 of the largest, as finely as a
        decomposition in float32, and a symmetric matrix of the shorter side is several times
        faster to decompose than the gradient.
        """
        assert grad is not None
        wide = grad.float().double()
        try:
            _, vectors = torch.linalg.eigh(wide.T @ wide)  # ascending
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise ValueError(
                f"selection='svd' cannot choose a subspace for {choice.name!r}: its gradient has NaN or"
                " infinite elements; skip such a step (GradScaler does)"
            ) from error
        basis: Tensor = vectors[:, size - rank :].flip(1).T.float().contiguous()
        return basis

    def describe(self) -> str:
        """One line for tables."""
        return "leading singular vectors of the switch step's gradient"


class RandomBasis(LowRank):
    """Orthonormalised Gaussian vectors."""

    name = "random"

    def right_basis(self, choice: Choice, rank: int, size: int, grad: Tensor | None) -> Tensor:
        """Draw from a generator of our own, on the parameter's device."""
        generator = torch.Generator(device=choice.device)
        generator.manual_seed(choice.key & (2**63 - 1))
        draw = torch.randn(
            size, rank, generator=generator, dtype=torch.float32, device=choice.device
        )
        basis: Tensor = torch.linalg.qr(draw).Q.T.contiguous()
        return basis

    def describe(self) -> str:
        """One line for tables."""
        return "random orthonormal basis"


class ShardedRows(LowRank):
    """Another low-rank selection, for this rank's rows of a matrix of `global_rows` rows.

    The gradient it is given at a switch is the whole matrix's; everything else is local.
    """

    def __init__(self, inner: LowRank, global_rows: int) -> None:
        self.inner, self.global_rows = inner, global_rows
        self.name, self.needs_grad = inner.name, inner.needs_grad  # type: ignore[misc]

    def rank(self, rows: int, columns: int, density: float) -> int:
        """As for the whole matrix."""
        return self.inner.rank(self.global_rows, columns, density)

    def num_slots(self, rows: int, columns: int, density: float) -> int:
        """Rank times the local rows."""
        return self.rank(rows, columns, density) * rows

    def num_basis(self, rows: int, columns: int, density: float) -> int:
        """Rank times the columns."""
        return self.rank(rows, columns, density) * columns

    def part_of(self, basis: Tensor, choice: Choice) -> Part:
        """Project the local rows."""
        return Subspace(basis, choice.rows, left=False, exact=choice.exact_complement)

    def basis(self, choice: Choice, rank: int) -> Tensor:
        """Take the right basis, whatever the shape."""
        return self.right_basis(choice, rank, choice.columns, choice.grad)

    def right_basis(self, choice: Choice, rank: int, size: int, grad: Tensor | None) -> Tensor:
        """Ask the inner selection."""
        return self.inner.right_basis(choice, rank, size, grad)

    def describe(self) -> str:
        """One line for tables."""
        return f"{self.inner.describe()}, each rank its own rows"
