"""Bytes of a model's parameters, gradients, buffers and optimizer state."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._python_dispatch import _disable_current_modes

from memopt.memory.fake_bytes import FakeBytes
from memopt.trace.live import States


def measure_states(model: Module, optimizer: torch.optim.Optimizer | None) -> States:
    """Count what exists now; tensors that share a storage count once."""
    parameters = list(model.parameters())
    seen: set[int] = set()
    return States(
        param_bytes=_unique_bytes(parameters, seen),
        grad_bytes=_unique_bytes(gradients(model), seen),
        buffer_bytes=_unique_bytes(model.buffers(), seen),
        optimizer_bytes=_unique_bytes(optimizer_tensors(optimizer), seen),
    )


def gradients(model: Module) -> Iterator[Tensor]:
    """Yield the gradients that exist; what functional_call put in a parameter's place may be no leaf."""
    for p in model.parameters():
        if p.is_leaf and p.grad is not None:
            yield p.grad


def expected_grad_bytes(model: Module) -> int:
    """Bytes of the gradients that one backward makes."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def missing_optimizer_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes of the state that the optimizer's first step will make; 0 where that cannot be told.

    A stand-in of the optimizer steps once on fake tensors, one per kind of parameter that has no
    state yet. Exact where each parameter's state depends on that parameter alone (AdamW, SGD, Muon
    ...); optimizers that look at values or take a closure cannot be asked this way.
    """
    if optimizer is None:
        return 0
    kinds: Counter[tuple[Any, ...]] = Counter()
    for index, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            # a sharded parameter shows the shape of the whole: what it would cost here is not known
            plain = type(p) in (Tensor, torch.nn.Parameter) and p.layout is torch.strided
            if plain and p.requires_grad and p not in optimizer.state:
                kinds[index, tuple(p.shape), p.stride(), p.dtype, p.device] += 1
    try:
        return sum(_state_bytes(optimizer, *kind) * count for kind, count in kinds.items())
    except Exception:  # noqa: BLE001 - anyone's optimizer, on tensors it was not written for
        return 0


def optimizer_peak_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    """Return what the optimizer's next step holds above what is alive before it; 0 where that cannot be told.

    New state and what is held for a moment (a tensor per parameter where all are stepped at once)
    show in a stand-in's step on fakes of all parameters: 3 ms for each parameter.
    """
    if optimizer is None:
        return 0
    try:
        with _disable_current_modes():
            return _step_peak_bytes(optimizer)
    except Exception:  # noqa: BLE001 - anyone's optimizer, on tensors it was not written for
        return 0


def _step_peak_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes above the level before a step, at its largest, on fakes of everything that has gradients."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    stand_in = _stand_in(optimizer)
    fakes: dict[int, torch.nn.Parameter] = {}
    with FakeTensorMode(), FakeBytes() as count:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if type(p) not in (Tensor, torch.nn.Parameter) or p.layout is not torch.strided:
                    return 0
                if p.requires_grad:
                    fakes[id(p)] = torch.nn.Parameter(_fake(p))
                    fakes[id(p)].grad = torch.empty_like(fakes[id(p)])
        for p, state in optimizer.state.items():
            if id(p) in fakes:
                stand_in.state[fakes[id(p)]] = {k: _fake_state(v) for k, v in state.items()}
        stand_in.param_groups = [
            {**group, "params": [fakes[id(p)] for p in group["params"] if id(p) in fakes]}
            for group in optimizer.param_groups
        ]
        before: int = count.current_bytes
        count.reset_peak()
        type(optimizer).step(stand_in)
    return int(count.peak_bytes) - before


def _fake_state(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return copy.copy(value)
    if value.ndim == 0 and value.device.type == "cpu":
        return torch.tensor(_number(value))  # a fake that knows its value: counts of steps are read
    return _fake(value)


def _number(value: Tensor) -> float:
    with _disable_current_modes():
        return float(value.item())


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )


def _stand_in(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return a copy without hooks, state and parameters."""
    stand_in = copy.copy(optimizer)
    hooks = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    stand_in.__dict__ = {**optimizer.__dict__, **{name: OrderedDict() for name in hooks}}
    stand_in.state = defaultdict(dict)
    return stand_in


def _state_bytes(
    optimizer: torch.optim.Optimizer,
    group: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Bytes of state after one step on one fake parameter of the group."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    stand_in = _stand_in(optimizer)
    with FakeTensorMode():
        parameter = torch.nn.Parameter(
            torch.empty_strided(shape, stride, dtype=dtype, device=device)
        )
        parameter.grad = torch.empty_like(parameter)
        stand_in.param_groups = [{**optimizer.param_groups[group], "params": [parameter]}]
        type(optimizer).step(stand_in)  # the instance's own may be a scheduler's wrapper
    return _unique_bytes(_tensors(stand_in.state), set())


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
        inner = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        return [part for part in inner if isinstance(part, Tensor)]  # a DTensor names its mesh, too
    return [tensor] if tensor.layout is torch.strided and tensor.device.type != "meta" else []
