"""Small tables of numbers to a device, without a wait for what the device is doing.

`torch.tensor(values, device="cuda")` and a copy from pageable memory end with a synchronisation of
the stream: a switch that brings a few tables to the device would let it run dry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(values: Sequence[Any] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers (nested lists, or a CPU tensor) as a tensor on a device."""
    host = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def copy_into(target: Tensor, host: Tensor) -> None:
    """Copy a CPU tensor into one that is anywhere."""
    if target.is_cuda:
        target.copy_(host.pin_memory(), non_blocking=True)
    else:
        target.copy_(host)
