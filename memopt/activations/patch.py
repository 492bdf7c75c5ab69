"""What stands in for `module.forward` while the context is open.

For a module compiled in place it stands in for the compiled call, which takes precedence over
`forward` (compiled.py).

A small object, not a closure: copies of the model (`copy.deepcopy` for an EMA, `torch.save`) must
be the plain model, computing with their own weights. A closure as `forward` would make a deep copy
compute with the original's.
"""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn import Module

from memopt.activations.compiled import is_compiled_in_place

_MISSING = object()


class PatchedForward:
    """Callable put where the module's calls go; `handler(self, args, kwargs)` does the work.

    Args:
        module: the module.
        name: its qualified name in the model.
        handler: called with this object and the call's arguments.
    """

    def __init__(
        self,
        module: Module,
        name: str,
        handler: Callable[[PatchedForward, tuple[Any, ...], dict[str, Any]], Any],
    ) -> None:
        self.module = module
        self.name = name
        self.attribute = "_compiled_call_impl" if is_compiled_in_place(module) else "forward"
        self.plain: Callable[..., Any] = getattr(module, self.attribute)
        self.previous = module.__dict__.get(self.attribute, _MISSING)
        self._handler = handler
        functools.update_wrapper(self, self.plain, updated=())

    @property
    def replaces_nothing(self) -> bool:
        """Whether the module's class has the plain forward, and the object none of its own."""
        return self.previous is _MISSING and self.attribute == "forward"

    def install(self) -> PatchedForward:
        """Put this object in place."""
        self.module.__dict__[self.attribute] = self
        return self

    def remove(self) -> None:
        """Leave the module's `__dict__` as it was; whoever still holds this object runs the plain call."""
        self._handler = _run_plain
        if self.module.__dict__.get(self.attribute) is not self:
            return
        if self.previous is _MISSING:
            del self.module.__dict__[self.attribute]
        else:
            self.module.__dict__[self.attribute] = self.previous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the region, or the plain forward where nothing is to be saved.

        Inside torch.func's transforms and forward-mode AD, too: they do without saved tensors' hooks
        and storages. A shallow copy of the module (`copy.copy`, DataParallel's replicas) shares this
        object: it is called with its own weights.
        """
        if torch.compiler.is_compiling():
            return self.plain(*args, **kwargs)
        if args and args[0] is self.module:
            args = args[1:]  # accelerate's unwrap_model makes a method of whatever it finds
        owner = _called_module(sys._getframe(1))
        if owner is not None and owner is not self.module and self.replaces_nothing:
            return type(owner).forward(owner, *args, **kwargs)
        if not torch.is_grad_enabled() or _is_transformed():
            return self.plain(*args, **kwargs)
        return self._handler(self, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return the plain forward of the copied module."""
        if self.previous is not _MISSING:
            return copy.deepcopy(self.previous, memo)
        owner = memo.get(id(self.module), self.module)
        return types.MethodType(type(owner).forward, owner)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the plain forward of the unpickled module."""
        if self.previous is not _MISSING:
            return copy.copy, (self.previous,)
        return getattr, (self.module, "forward")


_MODULE_FILE = Module._call_impl.__code__.co_filename


def _called_module(caller: FrameType) -> Module | None:
    """Return the module of which this is the forward; None where it was not called through `Module.__call__`."""
    if caller.f_code.co_filename != _MODULE_FILE:
        return None
    return caller.f_locals.get("self")


def _run_plain(patch: PatchedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return patch.plain(*args, **kwargs)


def _is_transformed() -> bool:
    return (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )
