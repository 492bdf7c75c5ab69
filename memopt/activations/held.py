"""Python values as they were: taken down when a region's forward begins, put back for its recompute.

A value is taken down with what is in it: containers with their items, objects of the program's own
classes with their attributes, generators and numpy arrays with their states. Putting back fills the
very container, array or object where it is still in use, so that everyone who shares it sees it, and
makes one like it where it is gone (put_back.py).

Nothing that holds a graph is kept: a tensor by its bytes alone, an object that is not taken apart by
a weak reference. A frame that held the graph of a call would never die, for that holds the frame.
"""

from __future__ import annotations

import argparse
import enum
import random
import sys
import weakref
from collections.abc import Callable
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from memopt.activations.put_back import (
    ABSENT,
    EMPTY,
    MUTABLE,
    PLAIN,
    Contents,
    Node,
    Putter,
    Table,
    pairs_of,
    put_attributes,
)
from memopt.activations.tensors import graph_input, shared_alias
from memopt.types.errors import RecomputeMismatchError

LIBRARIES = frozenset(
    {
        "accelerate", "apex", "deepspeed", "liger_kernel", "memopt", "numpy", "peft", "torch",
        "transformers", "triton",
    }
)  # fmt: skip
"""Code that keeps nothing in its objects and globals by which a region's forward would differ from its recompute."""
_OPAQUE = LIBRARIES | sys.stdlib_module_names
_OPEN = (SimpleNamespace, argparse.Namespace)

_MAX_ITEMS = 256
"""Of a larger container the items are kept, not what is in them; of an object so large only its identity."""
_MAX_TABLE_ITEMS = 1 << 16
_MAX_ARRAY_BYTES = 1 << 20
_MAX_DEPTH = 4

ATOMS = frozenset(
    {
        int, float, bool, str, bytes, complex, type, type(None), torch.dtype, torch.device,
        torch.Size, frozenset, range, slice, BuiltinFunctionType,
    }
)  # fmt: skip
_FUNCTIONS = (FunctionType, MethodType, partial)
_EMPTY_CELL = CellType()


class Taker:
    """Takes values down, each container and object once.

    Args:
        on_function: told of every function that the program's own code may call.
    """

    def __init__(self, on_function: Callable[[Any], None]) -> None:
        self._on_function = on_function
        self._seen: dict[int, Any] = {}
        self.owners: list[Any] = []
        """Objects whose methods are among the functions."""

    def take(self, value: Any, depth: int = 0) -> Any:
        """Return what stands for a value: itself where that keeps nothing else alive and cannot change."""
        kind = type(value)
        if kind in ATOMS or isinstance(value, (Module, enum.Enum)):
            return value
        if isinstance(value, Tensor):
            return value if value.grad_fn is None else _Graphed(value)
        known = self._seen.get(id(value))
        if known is None:
            known = self._take(value, kind, depth)
        return known

    def _take(self, value: Any, kind: type, depth: int) -> Any:
        if kind in PLAIN or (isinstance(value, MUTABLE) and _is_container(kind)):
            return self._take_container(value, kind, depth)
        if kind in _FUNCTIONS:
            return self._take_function(value)
        if isinstance(value, np.ndarray):
            return self._note(value, _Array(value)) if _is_small(value) else value
        if isinstance(value, (random.Random, np.random.Generator, np.random.RandomState)):
            return self._note(value, _Generator(value))
        return self._take_object(value, depth)

    def _take_object(self, value: Any, depth: int) -> Any:
        if depth < _MAX_DEPTH and is_state(value):
            node = self._note(value, _Object(value))
            node.attributes = {n: self.take(v, depth + 1) for n, v in vars(value).items()}
            return node
        try:
            return _Elsewhere(value)
        except TypeError:
            return value

    def _note(self, value: Any, node: Any) -> Any:
        self._seen[id(value)] = node
        return node

    def _take_function(self, value: Any) -> Any:
        self._on_function(value)
        if isinstance(value, MethodType) and is_state(value.__self__):
            self.owners.append(self.take(value.__self__, 1))
        if _collects_nothing(value):
            return value
        try:
            return _Function(value)
        except TypeError:  # a bound method made for this moment
            return value

    def _take_container(self, value: Any, kind: type, depth: int) -> Any:
        if kind in PLAIN and not value:
            return EMPTY[kind]
        if len(value) > _MAX_TABLE_ITEMS or depth >= _MAX_DEPTH:
            return value
        base = next((b for b in MUTABLE if isinstance(value, b)), tuple)
        if len(value) > _MAX_ITEMS:
            return value if base is tuple else self._note(value, Table(value, base))
        node = self._note(value, Contents(value, base))
        node.items = [(key, self.take(item, depth + 1)) for key, item in pairs_of(value)]
        return node


def is_state(value: Any) -> bool:
    """Whether a value is an object of the program's own, whose attributes may be a region's state."""
    kind = type(value)
    return (
        kind.__dictoffset__ != 0
        and (kind in _OPEN or _is_of_program(kind))
        and not isinstance(value, (type, enum.Enum, Tensor, Module, *_FUNCTIONS))
        and len(vars(value)) <= _MAX_ITEMS
    )


def _is_small(array: Any) -> bool:
    return array.nbytes <= _MAX_ARRAY_BYTES and not array.dtype.hasobject


def _is_container(kind: type) -> bool:
    return kind.__module__ == "collections" or _is_of_program(kind)


def _is_of_program(kind: type) -> bool:
    return kind.__module__.partition(".")[0] not in _OPAQUE


class _Graphed(Node):
    """A tensor that has a graph: its bytes, and the tensor itself while others keep it."""

    __slots__ = ("_alias", "_tensor")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._alias = shared_alias(tensor)

    def put(self, now: Any, putter: Putter) -> Any:
        del putter
        tensor = self._tensor()
        return now if tensor is now and tensor is not None else graph_input(self._alias)


class _Elsewhere(Node):
    """An object of which only the identity is noted; gone, there is nothing to put back."""

    __slots__ = ("_ref",)

    def __init__(self, value: Any) -> None:
        self._ref = weakref.ref(value)

    def put(self, now: Any, putter: Putter) -> Any:
        del putter
        value = self._ref()
        return now if value is None else value


class _Function(_Elsewhere):
    """A hook or the like that may collect what the model returns: held, it would hold the graph."""

    __slots__ = ()

    def put(self, now: Any, putter: Putter) -> Any:
        if self._ref() is None:
            raise RecomputeMismatchError(
                "a hook or function that a region's modules had at forward is gone at backward, so "
                "the recomputation would be another program; remove it after backward"
            )
        return super().put(now, putter)


class _Object(Node):
    """An object of the program's own class: its attributes."""

    __slots__ = ("_id", "_kind", "_ref", "attributes")

    def __init__(self, value: Any) -> None:
        self._id = id(value)
        try:
            self._ref: Callable[[], Any] | None = weakref.ref(value)
        except TypeError:  # some classes have none: known by its place, as containers are
            self._ref = None
        self._kind: Any = type(value)
        self.attributes: dict[str, Any] = {}

    def put(self, now: Any, putter: Putter) -> Any:
        if self._ref is not None:
            value = self._ref()
        else:
            value = now if id(now) == self._id and type(now) is self._kind else None
        if value is None:
            try:
                value = self._kind.__new__(self._kind)
            except TypeError:  # it cannot be made without arguments
                if now is ABSENT:
                    raise RecomputeMismatchError(
                        f"an object of class {self._kind.__name__} that a region was given at forward "
                        "is gone at backward; keep it until then"
                    ) from None
                return now
        putter.is_at_work(self, value)
        put_attributes(vars(value), self.attributes, putter)
        return value


class _Array(Node):
    """A numpy array: its elements."""

    __slots__ = ("_array", "_elements")

    def __init__(self, array: Any) -> None:
        self._array = array
        self._elements = array.copy()

    def put(self, now: Any, putter: Putter) -> Any:
        del now
        if self._array.flags.writeable:
            putter.undo.append(partial(np.copyto, self._array, self._array.copy()))
            np.copyto(self._array, self._elements)
        return self._array


class _Generator(Node):
    """A generator of Python or numpy."""

    __slots__ = ("_generator", "_state")

    def __init__(self, generator: Any) -> None:
        self._generator = generator
        self._state = _state_of(generator)

    def put(self, now: Any, putter: Putter) -> Any:
        del now
        putter.undo.append(partial(_set_state, self._generator, _state_of(self._generator)))
        _set_state(self._generator, self._state)
        return self._generator


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
        kind in ATOMS
        or isinstance(value, Module)
        or (kind in _FUNCTIONS and _collects_nothing(value))
    )


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
