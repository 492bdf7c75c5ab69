"""A model's stand-in for a dry run: the same modules with fake tensors, and nothing that both could change.

Every module is a new object of the same class; parameters and buffers are fakes of their sizes, attributes are
copied as deep as they can change. Where that cannot be done for sure (hooks of the program's own, objects of unknown
classes, generators, tensor subclasses) `Impure` says what stood in the way, and there is no stand-in.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.modules import module as module_globals

from memopt.trace.purity import Impure, check_classes, check_function, is_constant, is_trusted

__all__ = ["StandIns"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_CONTAINERS = (list, tuple, dict, set, frozenset, OrderedDict, deque)


class StandIns:
    """Stand-ins of modules, tensors and arguments; build them inside a `FakeTensorMode`.

    Args:
        is_ours: whether an attribute of a module was put there for the time of the session.
    """

    def __init__(self, is_ours: Callable[[Any], bool]) -> None:
        self._is_ours = is_ours
        self._memo: dict[int, Any] = {}
        self._alive: list[Any] = []  # a memo by id needs its objects alive

    def model(self, model: Module) -> Module:
        """Return the stand-in of a model.

        Raises:
            Impure: a call of it might change something of the model or of the program.
        """
        if any(
            getattr(module_globals, f"_global{name}", None)
            for name in (*_HOOKS, "_buffer_registration_hooks", "_parameter_registration_hooks")
        ):
            raise Impure("global hooks of modules")
        check_classes({type(m) for m in model.modules()})
        found: Module = self.value(model)
        return found

    def of(self, module: Module) -> Module | None:
        """Return the stand-in of a module that the model holds."""
        return self._memo.get(id(module))

    def value(self, value: Any) -> Any:
        """Return the stand-in of anything: itself where it cannot change.

        Raises:
            Impure: nothing is known of its kind.
        """
        if is_constant(value):
            return value
        if id(value) in self._memo:
            return self._memo[id(value)]
        made = self._make(value)
        self._memo[id(value)] = made
        self._alive.append(value)
        return made

    def _make(self, value: Any) -> Any:  # noqa: PLR0911 - one line per kind
        kind = type(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, Module):
            return self._module(value)
        if kind is weakref.ref:
            return weakref.ref(self.value(value()))
        if kind in _CONTAINERS:
            return self._container(value)
        if isinstance(value, types.MethodType):
            return types.MethodType(self._checked(value.__func__), self.value(value.__self__))
        if kind is functools.partial:
            args, kwargs = self.value(value.args), self.value(value.keywords)
            return functools.partial(self.value(value.func), *args, **kwargs)
        if isinstance(value, types.FunctionType):
            return self._checked(value)
        if isinstance(value, type) or (callable(value) and kind.__module__ == "builtins"):
            return value
        if is_trusted(kind) and not isinstance(value, torch.Generator) and not callable(value):
            return copy.deepcopy(value)  # a configuration
        raise Impure(f"an object of class {kind.__name__}")

    def _checked(self, function: Any) -> Any:
        check_function(function)
        if function.__closure__ is not None and not is_trusted(function):
            for cell in function.__closure__:
                if not is_constant(cell.cell_contents):
                    raise Impure(f"{function.__name__} is a closure")
        return function

    def _container(self, value: Any) -> Any:
        if isinstance(value, dict):
            made = type(value)()
            self._memo[id(value)] = made
            made.update((self.value(k), self.value(v)) for k, v in value.items())
            return made
        return type(value)(self.value(item) for item in value)

    def _tensor(self, value: Tensor) -> Tensor:
        if type(value) not in (Tensor, Parameter) or value.layout is not torch.strided:
            raise Impure(f"a tensor of class {type(value).__name__}")
        if any(getattr(value, name, None) for name in _TENSOR_HOOKS):
            raise Impure("hooks of a tensor")
        fake = torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )
        if isinstance(value, Parameter):
            fake = Parameter(fake, requires_grad=value.requires_grad)
        elif value.requires_grad:
            fake.requires_grad_(True)
        if value.is_leaf and value.grad is not None:
            fake.grad = torch.empty_like(fake)
        return fake

    def _module(self, module: Module) -> Module:
        made: Module = module.__class__.__new__(module.__class__)
        self._memo[id(module)] = made
        attributes: dict[str, Any] = {}
        for name, value in module.__dict__.items():
            if name in _HOOKS and value:
                raise Impure(f"{name} of {type(module).__name__}")
            if name == "_compiled_call_impl" and value is not None:
                raise Impure("a compiled module")
            if name in _HOOKS or (
                name.startswith("_") and name.endswith(("_hooks", "_with_kwargs"))
            ):
                attributes[name] = OrderedDict()
            elif not self._is_ours(value):
                attributes[name] = self.value(value)
        made.__dict__.update(attributes)
        return made
