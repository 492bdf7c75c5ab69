"""How a parameter of any shape is seen as a matrix, and a sharded one as its local part."""

from __future__ import annotations

import math

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
