"""Is a function free of effects beyond its arguments and its object? Asked of bytecode, without running it.

A dry run calls the program's own forward on stand-ins, once more than the program does. Stand-ins keep what happens
to the model's tensors and attributes apart; what a forward does to the rest of the world (a global counter, a log, a
file) nothing can take back. Libraries of models are trusted. Any other function must show, with all it calls, that it
names nothing but those libraries, pure builtins, constants and functions of the same kind, and stores nothing but
locals and attributes of locals. What is not understood is impure: then there is no dry run, and nothing is lost but
an early answer.
"""

from __future__ import annotations

import builtins
import dis
import enum
import types
from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["Impure", "check_classes", "check_function", "is_constant", "is_trusted"]

TRUSTED = frozenset({"torch", "transformers", "peft"})
_PURE_MODULES = TRUSTED | {"math", "operator", "itertools", "typing", "einops", "__future__"}
_PURE_BUILTINS = frozenset({
    "abs", "all", "any", "bool", "bytes", "complex", "dict", "divmod", "enumerate", "filter",
    "float", "frozenset", "getattr", "hasattr", "int", "isinstance", "issubclass", "iter", "len",
    "list", "map", "max", "min", "next", "range", "reversed", "round", "set", "slice", "sorted",
    "str", "sum", "super", "tuple", "zip", "None", "True", "False", "NotImplemented", "Ellipsis",
})  # fmt: skip
_EFFECTS = frozenset({
    "__class__", "__dict__", "__globals__", "__builtins__", "save", "load", "seed",
    "manual_seed", "manual_seed_all", "distributed", "fork_rng", "register_hook",
    "register_forward_hook", "register_module_forward_hook", "library", "compile", "hub",
    "multiprocessing", "share_memory_", "numpy", "data_ptr",
})  # fmt: skip
_CALLED_UNNAMED = (
    "forward",
    "__call__",
    "__getattr__",
    "__setattr__",
    "__getitem__",
    "__len__",
    "__iter__",
)
_CONSTANTS = (
    type(None), bool, int, float, complex, str, bytes, type(Ellipsis), slice, range, enum.Enum, torch.dtype,
    torch.device, torch.Size, torch.layout, torch.memory_format, types.BuiltinFunctionType,
)  # fmt: skip


class Impure(Exception):  # noqa: N818 - a verdict, and no error of the program
    """Says what could not be shown to be free of effects."""


def is_trusted(thing: Any) -> bool:
    """Whether a class or function comes from a library whose forwards touch nothing but their model."""
    module = getattr(thing, "__module__", None) or ""
    return module.partition(".")[0] in TRUSTED and not module.startswith("torch.distributed")


def is_constant(value: Any) -> bool:
    """Whether a value cannot be changed."""
    if isinstance(value, (tuple, frozenset)):
        return all(map(is_constant, value))
    return isinstance(value, _CONSTANTS)


def check_classes(classes: Iterable[type]) -> None:
    """Check what calls of these modules' classes run.

    Raises:
        Impure: something in them may have an effect.
    """
    lines = dict.fromkeys(
        c
        for cls in classes
        for c in cls.__mro__
        if c.__module__ not in ("builtins", "abc", "typing")
    )
    methods: dict[str, list[Any]] = {}
    for cls in lines:
        if is_trusted(cls):  # but for what the program put into it
            for value in vars(cls).values():
                for function in _functions_of(value):
                    check_function(function)
            continue
        for name, value in vars(cls).items():
            methods.setdefault(name, []).append((cls, value))
            if not (name.startswith("__") or callable(value) or is_constant(value)):
                _check_descriptor(cls, name, value)
    checker = _Checker(methods)
    for name in _CALLED_UNNAMED:
        checker.reach(name)


def check_function(function: Any) -> None:
    """Check one function and what it calls.

    Raises:
        Impure: it may have an effect.
    """
    _Checker({}).function(function)


def _check_descriptor(cls: type, name: str, value: Any) -> None:
    if not isinstance(value, (property, staticmethod, classmethod, types.FunctionType)):
        raise Impure(f"{cls.__name__}.{name} is shared by all objects of the class")


class _Checker:
    """Walks code; `methods` are those of the program's classes, by name: any object may be the receiver."""

    def __init__(self, methods: dict[str, list[Any]]) -> None:
        self._methods = methods
        self._seen: set[Any] = set()

    def reach(self, name: str) -> None:
        """Check every method that an attribute of this name may mean."""
        for cls, value in self._methods.get(name, ()):
            for function in _functions_of(value):
                self.function(function)
            if not _functions_of(value) and callable(value):
                raise Impure(f"{cls.__name__}.{name} is a {type(value).__name__}")

    def function(self, function: Any) -> None:
        """Check a function."""
        if is_trusted(function):
            return
        if not isinstance(function, types.FunctionType):
            raise Impure(f"{function!r} is no Python function")
        if function in self._seen:
            return
        self._seen.add(function)
        free = function.__code__.co_freevars
        for name, cell in zip(free, function.__closure__ or (), strict=True):
            if name != "__class__":
                self._value(name, cell.cell_contents)
        self._code(function.__code__, function.__globals__)

    def _code(self, code: types.CodeType, names: dict[str, Any]) -> None:
        before = ""
        for instruction in dis.get_instructions(code):
            op, name = instruction.opname, instruction.argval
            if op in ("STORE_GLOBAL", "DELETE_GLOBAL", "IMPORT_NAME", "LOAD_BUILD_CLASS"):
                raise Impure(f"{code.co_name}: {op} {name}")
            if op == "STORE_DEREF" and name in code.co_freevars:
                raise Impure(f"{code.co_name} writes {name} of the function around it")
            if op in ("STORE_ATTR", "DELETE_ATTR") and not before.startswith("LOAD_FAST"):
                raise Impure(f"{code.co_name} sets .{name} of something that is no local")
            if op in ("LOAD_GLOBAL", "LOAD_NAME"):
                self._global(name, names)
            elif op in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
                if name in _EFFECTS or name.startswith("set_"):
                    raise Impure(f"{code.co_name} uses .{name}")
                self.reach(name)
            before = op if op not in ("CACHE", "EXTENDED_ARG") else before
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant, names)

    def _global(self, name: str, names: dict[str, Any]) -> None:
        if name in names:
            self._value(name, names[name])
        elif name not in _PURE_BUILTINS and not _is_exception(getattr(builtins, name, None)):
            raise Impure(f"{name}")

    def _value(self, name: str, value: Any) -> None:
        """Check what a name outside the function stands for."""
        if isinstance(value, types.ModuleType):
            root = value.__name__.partition(".")[0]
            if root not in _PURE_MODULES or value.__name__.startswith("torch.distributed"):
                raise Impure(f"the module {name}")
        elif isinstance(value, types.FunctionType):
            self.function(value)
        elif isinstance(value, type):
            if not (is_trusted(value) or _is_exception(value) or value.__module__ == "builtins"):
                raise Impure(f"the class {name}")
        elif not is_constant(value) and not is_trusted(value):
            raise Impure(f"{name} is a {type(value).__name__} that others may share")


def _functions_of(value: Any) -> list[Any]:
    if isinstance(value, property):
        return [f for f in (value.fget, value.fset) if f is not None]
    if isinstance(value, (staticmethod, classmethod)):
        return [value.__func__]
    return [value] if isinstance(value, types.FunctionType) else []


def _is_exception(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)
