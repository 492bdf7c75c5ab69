"""The sign that does not hide a broken gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def sign(value: Tensor) -> Tensor:
    """Return -1, 0 or 1, and NaN for NaN (`torch.sign` gives 0 there and hides the error)."""
    return torch.where(value.isnan(), value, value.sign())
