"""Where the code of a region's modules keeps state beside its objects: globals, closures, classes.

A method that appends to a global list, counts in a class attribute or reads what a closure shares
names it in its bytecode. Every function that the program's own classes define is searched, and the
functions that those name, once per class; a place is looked up by name at each call, so what it is
bound to may change. Libraries of models are not searched: their blocks keep their state in modules.
"""

from __future__ import annotations

import dis
import weakref
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch.nn import Module

from memopt.activations.held import LIBRARIES
from memopt.activations.put_back import ABSENT

_MAX_FUNCTIONS = 256
_GLOBAL = frozenset({"LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME"})


class Place:
    """A name in a namespace, a cell of a closure, or an attribute of a class."""

    __slots__ = ("key", "read", "write")

    def __init__(self, key: Any, read: Callable[[], Any], write: Callable[[Any], object]) -> None:
        self.key = key
        self.read = read
        self.write = write


_OF_CLASS: weakref.WeakKeyDictionary[Any, tuple[Place, ...]] = weakref.WeakKeyDictionary()
_OF_FUNCTION: weakref.WeakKeyDictionary[Any, tuple[Place, ...]] = weakref.WeakKeyDictionary()


def places_of_class(cls: type) -> tuple[Place, ...]:
    """Return the places that a module class's own code names."""
    places = _OF_CLASS.get(cls)
    if places is None:
        search = _Search()
        search.visit_class(cls)
        places = _OF_CLASS[cls] = tuple(search.places.values())
    return places


def places_of_function(function: Any) -> tuple[Place, ...]:
    """Return the places that a function (a hook, an attribute that is called) names."""
    if isinstance(function, MethodType):
        function = function.__func__
    if not isinstance(function, FunctionType) or _is_library(function):
        return ()
    places = _OF_FUNCTION.get(function)
    if places is None:
        search = _Search()
        search.visit_function(function)
        places = _OF_FUNCTION[function] = tuple(search.places.values())
    return places


def _is_library(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "").partition(".")[0] in LIBRARIES


class _Search:
    def __init__(self) -> None:
        self.places: dict[Any, Place] = {}
        self._seen: set[int] = set()

    def visit_class(self, cls: type) -> None:
        """Search a class, those above it, and what it keeps in itself."""
        for line in cls.__mro__:
            if line in (Module, object) or _is_library(line) or not self._is_new(line):
                continue
            for name, value in list(vars(line).items()):
                functions = list(_functions_in(value))
                for function in functions:
                    self.visit_function(function)
                if not functions and not name.startswith("__"):
                    self._add_class_attribute(line, name, value)

    def visit_function(self, function: FunctionType) -> None:
        """Search a function and what it names."""
        if _is_library(function) or len(self._seen) > _MAX_FUNCTIONS or not self._is_new(function):
            return
        wrapped = getattr(function, "__wrapped__", None)
        if isinstance(wrapped, FunctionType):
            self.visit_function(wrapped)
        space = function.__globals__
        names, attributes = _names_in(function.__code__)
        for name in sorted(names & space.keys()):
            self._visit_named(space, name, attributes)
        for cell in function.__closure__ or ():
            self._visit_cell(cell)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._add(Place(("default", id(value)), _constant(value), _ignore))

    def _visit_named(self, space: dict[str, Any], name: str, attributes: frozenset[str]) -> None:
        value = space[name]
        if isinstance(value, FunctionType):
            self.visit_function(value)
        elif isinstance(value, type):
            if not _is_library(value) and value.__module__ != "builtins":
                self.visit_class(value)
        elif isinstance(value, ModuleType):
            if value.__name__.partition(".")[0] not in LIBRARIES and self._is_new(value):
                inner = vars(value)
                for other in sorted(attributes & inner.keys()):
                    self._visit_named(inner, other, attributes)
        else:
            self._add(_of_name(space, name))

    def _visit_cell(self, cell: CellType) -> None:
        try:
            value = cell.cell_contents
        except ValueError:  # empty
            return
        if isinstance(value, FunctionType):
            self.visit_function(value)
        elif isinstance(value, type):
            self.visit_class(value)
        elif not isinstance(value, Module):
            self._add(_of_cell(cell))

    def _add_class_attribute(self, cls: type, name: str, value: Any) -> None:
        if not callable(value) and not hasattr(type(value), "__get__"):
            key = ("class", id(cls), name)
            space = vars(cls)
            self._add(
                Place(
                    key, lambda: space.get(name, ABSENT), lambda new: _set_on_class(cls, name, new)
                )
            )

    def _add(self, place: Place) -> None:
        self.places.setdefault(place.key, place)

    def _is_new(self, thing: Any) -> bool:
        new = id(thing) not in self._seen
        self._seen.add(id(thing))
        return new


def _functions_in(value: Any) -> Iterator[FunctionType]:
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    parts = (value.fget, value.fset) if isinstance(value, property) else (value,)
    yield from (part for part in parts if isinstance(part, FunctionType))


def _names_in(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Return the global names in a function and those inside it, and the names of attributes."""
    inner = [_names_in(c) for c in code.co_consts if isinstance(c, CodeType)]
    own = {i.argval for i in dis.get_instructions(code) if i.opname in _GLOBAL}
    names = frozenset(own).union(*(n for n, _ in inner))
    return names, frozenset(code.co_names).union(*(a for _, a in inner))


def _of_name(space: dict[str, Any], name: str) -> Place:
    def write(value: Any) -> None:
        if value is ABSENT:
            space.pop(name, None)
        else:
            space[name] = value

    return Place(("name", id(space), name), lambda: space.get(name, ABSENT), write)


def _of_cell(cell: CellType) -> Place:
    def read() -> Any:
        try:
            return cell.cell_contents
        except ValueError:
            return ABSENT

    def write(value: Any) -> None:
        if value is ABSENT:
            del cell.cell_contents
        else:
            cell.cell_contents = value

    return Place(("cell", id(cell)), read, write)


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


def _ignore(value: Any) -> None:
    del value


def _set_on_class(cls: type, name: str, value: Any) -> None:
    if value is ABSENT:
        delattr(cls, name)
    else:
        setattr(cls, name, value)
