"""How a parameter of any shape is seen as a matrix, and a sharded one as its local part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_EXACT = 1e-12  # absorbs the rounding of density * size for sizes up to 10**12; never adds one


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, and any other tensor itself."""
    if type(tensor) in (Tensor, torch.nn.Parameter):  # nearly always; this runs for every step
        return tensor
    to_local = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    local = to_local()
    assert isinstance(local, Tensor)
    return local


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Return (rows, columns): (shape[0], rest) of a tensor, (n, 1) of a vector, (1, 1) of a number."""
    if len(shape) == 0:
        return 1, 1
    return shape[0], math.prod(shape[1:])


def as_matrix(tensor: Tensor) -> Tensor:
    """View a contiguous tensor as its matrix."""
    return tensor.view(matrix_shape(tensor.shape))


def share(density: float, size: int) -> int:
    """Return floor(density * size), exact where the product is a whole number."""
    return min(size, math.floor(density * size * (1.0 + _EXACT)))


@dataclass(frozen=True)
class Shards:
    """How a DTensor's rows (dim 0) are cut: into `count` runs, as `torch.chunk` does."""

    count: int
    global_rows: int

    @property
    def largest(self) -> int:
        """Rows of the first shard, which is never smaller than another."""
        return -(-self.global_rows // self.count)

    @property
    def even(self) -> bool:
        """Whether all shards have as many rows."""
        return self.global_rows % self.count == 0


def shards_of(param: Tensor) -> Shards | None:
    """Return how a parameter's rows are cut; None if each rank holds the whole, or it is no DTensor.

    Raises:
        ValueError: for a DTensor that is cut along another dimension.
    """
    if not hasattr(param, "device_mesh"):
        return None
    from torch.distributed.tensor import Replicate, Shard

    placements: Any = param.placements  # type: ignore[attr-defined]
    mesh: Any = param.device_mesh
    count = 1
    for dim, placement in enumerate(placements):
        if isinstance(placement, Replicate):
            continue
        if not (isinstance(placement, Shard) and placement.dim == 0):
            raise ValueError(
                f"Frugal takes DTensors that are sharded along dim 0 or replicated, not {placement}:"
                " shard the rows (fully_shard does), or step the local tensors"
            )
        count *= mesh.size(dim)
    return Shards(count, param.shape[0]) if count > 1 else None
