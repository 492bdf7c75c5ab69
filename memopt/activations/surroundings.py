"""What a region reads that is neither an argument, a weight nor a buffer: put back for its recompute.

A forward is Python, and Python reads what it likes: `self.training`, the name of the active
adapter, a scale that a schedule sets, a list that it appends its auxiliary loss to, hooks that were
there for one call, which attention kernels are allowed. Any of it may be another when backward
comes: two adapters used before one backward gave gradients of the second twice, without a word.

So a frame takes down the attributes of the region's modules (containers with their contents), which
parameters require gradients, and a few of PyTorch's global flags. A recomputation starts from
these, and leaves what it found: appended twice, counted twice would be other programs too.
Tensors that have a graph are held by their bytes alone, for a frame that held the graph of the call
before would hold that one's frame. What lies elsewhere (a global, an object that the modules share)
is not put back; witness.py finds it in the traced step.
"""

from __future__ import annotations

import random
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import parametrize

from memopt.activations.tensors import graph_input, shared_alias
from memopt.types.errors import RecomputeMismatchError

Undo = list[Callable[[], object]]

_MAX_ITEMS = 256
"""Larger containers are tables, not state."""
_MAX_DEPTH = 3
_ABSENT = object()
_EMPTY_CELL = CellType()
_ELSEWHERE = frozenset(
    {
        "_parameters", "_buffers", "_non_persistent_buffers_set", "_state_dict_hooks",
        "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
    }
)  # fmt: skip
_CALLS = ("forward", "_compiled_call_impl")
_ATOMS = frozenset(
    {
        int, float, bool, str, bytes, complex, type, type(None), torch.dtype, torch.device,
        torch.Size, BuiltinFunctionType,
    }
)  # fmt: skip
_FUNCTIONS = (FunctionType, MethodType, partial)
_CONTAINERS = frozenset({list, dict, set, deque, OrderedDict, tuple})


class _Graphed:
    """A tensor that has a graph: its bytes, and the tensor itself while others keep it."""

    __slots__ = ("_alias", "_tensor")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._alias = shared_alias(tensor)

    def value(self, now: Any, undo: Undo) -> Any:
        del undo
        tensor = self._tensor()
        return now if tensor is now and tensor is not None else graph_input(self._alias)


class _Elsewhere:
    """An object of which only the identity is noted; gone, there is nothing to put back."""

    __slots__ = ("_ref",)

    def __init__(self, value: Any) -> None:
        self._ref = weakref.ref(value)

    def value(self, now: Any, undo: Undo) -> Any:
        del undo
        value = self._ref()
        return now if value is None else value


class _Function(_Elsewhere):
    """A hook or the like that may collect what the model returns: held, it would hold the graph."""

    __slots__ = ()

    def value(self, now: Any, undo: Undo) -> Any:
        if self._ref() is None:
            raise RecomputeMismatchError(
                "a hook or function that a region's modules had at forward is gone at backward, so "
                "the recomputation would be another program; remove it after backward"
            )
        return super().value(now, undo)


class _Contents:
    """A container: what was in it."""

    __slots__ = ("_id", "_items", "_kind")

    def __init__(self, container: Any, depth: int) -> None:
        self._id = id(container)
        self._kind = type(container)
        pairs = container.items() if isinstance(container, dict) else enumerate(container)
        self._items = [(key, _held(item, depth + 1)) for key, item in pairs]

    def value(self, now: Any, undo: Undo) -> Any:
        same = id(now) == self._id and type(now) is self._kind
        if not same:
            return self._made(undo, {})
        before = dict(now.items() if isinstance(now, dict) else enumerate(now))
        made = self._made(undo, before)
        after = made.items() if isinstance(made, dict) else enumerate(made)
        unchanged = len(made) == len(before) and all(
            before.get(key, _ABSENT) is item for key, item in after
        )
        if not unchanged and self._kind is not tuple:
            undo.append(partial(_fill, now, now.copy()))
            _fill(now, made)
        return now

    def _made(self, undo: Undo, now: dict[Any, Any]) -> Any:
        items = [(k, _put_back(h, now.get(k, _ABSENT), undo)) for k, h in self._items]
        return self._kind(items if issubclass(self._kind, dict) else [v for _, v in items])


class _Generator:
    """A generator of Python or numpy that belongs to a module."""

    __slots__ = ("_generator", "_state")

    def __init__(self, generator: Any) -> None:
        self._generator = generator
        self._state = _state_of(generator)

    def value(self, now: Any, undo: Undo) -> Any:
        del now
        undo.append(partial(_set_state, self._generator, _state_of(self._generator)))
        _set_state(self._generator, self._state)
        return self._generator


class _Empty:
    """What stands for every empty container of a kind: most of a module's are empty."""

    __slots__ = ("_kind",)

    def __init__(self, kind: Any) -> None:
        self._kind = kind

    def value(self, now: Any, undo: Undo) -> Any:
        if type(now) is not self._kind or self._kind is tuple:
            return self._kind()
        if not now:
            return now
        undo.append(partial(_fill, now, now.copy()))
        now.clear()
        return now


_EMPTY: dict[Any, _Empty] = {kind: _Empty(kind) for kind in _CONTAINERS}
_HELD = (_Empty, _Graphed, _Elsewhere, _Function, _Contents, _Generator)


def _held_attributes(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return what stands for a module's attributes; every region call pays for it."""
    found = {}
    for name, value in attributes.items():
        kind = type(value)
        if kind in _ATOMS:
            found[name] = value
        elif kind in _CONTAINERS and not value:
            found[name] = _EMPTY[kind]
        elif name not in _ELSEWHERE:
            found[name] = _held(value, 0)
    return found


def _held(value: Any, depth: int) -> Any:
    """Return what stands for a value until backward: itself where that keeps nothing else alive."""
    kind = type(value)
    still = isinstance(value, Module) or (kind in _FUNCTIONS and _collects_nothing(value))
    if still or kind in _ATOMS:
        return value
    if isinstance(value, Tensor):
        return value if value.grad_fn is None else _Graphed(value)
    if kind in _CONTAINERS:
        fits = depth < _MAX_DEPTH and len(value) <= _MAX_ITEMS
        return _Contents(value, depth) if fits else value
    if isinstance(value, (random.Random, np.random.Generator, np.random.RandomState)):
        return _Generator(value)
    try:
        return (_Function if kind in _FUNCTIONS else _Elsewhere)(value)
    except TypeError:
        return value


def _collects_nothing(function: Any) -> bool:
    """Whether nothing that a function holds can hold a graph."""
    if isinstance(function, MethodType):
        return isinstance(function.__self__, Module)
    if isinstance(function, partial):
        values = [function.func, *function.args, *function.keywords.values()]
    else:
        cells = function.__closure__ or ()
        values = [c.cell_contents for c in cells if c != _EMPTY_CELL]
    return all(_is_still(value) for value in values)


def _is_still(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.grad_fn is None
    kind = type(value)
    return (
        kind in _ATOMS
        or isinstance(value, Module)
        or (kind in _FUNCTIONS and _collects_nothing(value))
    )


def _put_back(held: Any, now: Any, undo: Undo) -> Any:
    return held.value(now, undo) if type(held) in _HELD else held


def _fill(container: Any, contents: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(contents)


def _state_of(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


class Surroundings:
    """The Python state around one region call, as it was when the call began.

    Args:
        modules: the region, then those inside it.
        parameters: theirs.
    """

    __slots__ = ("_attributes", "_flags", "_requires_grad")

    def __init__(self, modules: list[Module], parameters: Iterable[Tensor]) -> None:
        self._attributes = [(m.__dict__, _held_attributes(m.__dict__)) for m in modules]
        for name in _CALLS:  # the region's own, where memopt's patch is
            self._attributes[0][1].pop(name, None)
        self._requires_grad = [(p, p.requires_grad) for p in parameters]
        self._flags = _flags()

    def swap_in(self, undo: Undo) -> None:
        """Put the state of the call in place; `undo`, run from its end, puts back what stood there."""
        for attributes, before in self._attributes:
            for name, held in before.items():
                now = attributes.get(name, _ABSENT)
                if now is held or (held is _EMPTY.get(type(now), _ABSENT) and not now):
                    continue
                value = _put_back(held, now, undo)
                if value is not now:
                    undo.append(partial(_set, attributes, name, now))
                    _set(attributes, name, value)
            if len(attributes) > len(before):
                new = attributes.keys() - before.keys() - _ELSEWHERE - set(_CALLS)
                for name in new:
                    undo.append(partial(_set, attributes, name, attributes.pop(name)))
        for parameter, requires_grad in self._requires_grad:
            if parameter.requires_grad != requires_grad and parameter.is_leaf:
                undo.append(partial(parameter.requires_grad_, not requires_grad))
                parameter.requires_grad_(requires_grad)
        now_set = _flags()
        for (_, setter), before_set, now in zip(_FLAGS, self._flags, now_set, strict=True):
            if before_set != now:
                undo.append(partial(setter, now))
                setter(before_set)
        _swap_cache(self._flags[-1], undo)


def _set(attributes: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        attributes.pop(name, None)
    else:
        attributes[name] = value


def _set_parametrize_cache(count: int) -> None:
    vars(parametrize)["_cache_enabled"] = count


def _swap_cache(enabled: int, undo: Undo) -> None:
    """Weights that `parametrize.cached()` computed once are computed once in the recompute too."""
    if enabled:
        cache = parametrize._cache
        undo.append(partial(_fill, cache, dict(cache)))
        cache.clear()


_SDP = torch.backends.cuda
_FLAGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (_SDP.flash_sdp_enabled, _SDP.enable_flash_sdp),
    (_SDP.mem_efficient_sdp_enabled, _SDP.enable_mem_efficient_sdp),
    (_SDP.math_sdp_enabled, _SDP.enable_math_sdp),
    (_SDP.cudnn_sdp_enabled, _SDP.enable_cudnn_sdp),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (lambda: parametrize._cache_enabled, _set_parametrize_cache),
)


def _flags() -> tuple[Any, ...]:
    return tuple(getter() for getter, _ in _FLAGS)


def undo_all(undo: Undo) -> None:
    """Run from the last to the first, and forget."""
    while undo:
        undo.pop()()
