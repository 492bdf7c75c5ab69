"""Bytes of a model's parameters, gradients, buffers and optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from memopt.trace.live import States


def measure_states(model: Module, optimizer: torch.optim.Optimizer | None) -> States:
    """Count what exists now; tensors that share a storage count once."""
    parameters = list(model.parameters())
    seen: set[int] = set()
    return States(
        param_bytes=_unique_bytes(parameters, seen),
        grad_bytes=_unique_bytes((p.grad for p in parameters if p.grad is not None), seen),
        buffer_bytes=_unique_bytes(model.buffers(), seen),
        optimizer_bytes=_unique_bytes(optimizer_tensors(optimizer), seen),
    )


def expected_grad_bytes(model: Module) -> int:
    """Bytes of the gradients that one backward makes."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def optimizer_tensors(optimizer: torch.optim.Optimizer | None) -> Iterator[Tensor]:
    """Yield every tensor in an optimizer's state, nested containers included."""
    if optimizer is not None:
        yield from _tensors(optimizer.state)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _unique_bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        for part in _parts(tensor):
            storage = part.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                total += storage.nbytes()
    return total


def _parts(tensor: Tensor) -> list[Tensor]:
    if hasattr(tensor, "__tensor_flatten__") and type(tensor) not in (Tensor, torch.nn.Parameter):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [tensor] if tensor.layout is torch.strided and tensor.device.type != "meta" else []
