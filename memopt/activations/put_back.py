"""Putting Python values back: what stands for them until then, and what was in their containers.

Whatever is put back is noted with what it held before, changed or not, for a recompute may change it
again: a loop that collects the auxiliary losses of its blocks and clears the list before backward
would find them there a second time.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from copy import copy
from functools import partial
from operator import is_
from typing import Any

Undo = list[Callable[[], object]]

ABSENT = object()
MUTABLE: tuple[type, ...] = (OrderedDict, dict, list, deque, set)
PLAIN = frozenset({*MUTABLE, tuple})


class Node:
    """What stands for a value until backward."""

    __slots__ = ()

    def put(self, now: Any, putter: Putter) -> Any:
        """Return the value as it was; `now` stands in its place."""
        raise NotImplementedError


class Putter:
    """One putting-back: what it touched is put back as it found it by `undo`, run from its end."""

    def __init__(self, undo: Undo) -> None:
        self.undo = undo
        self._done: dict[int, Any] = {}

    def put(self, held: Any, now: Any) -> Any:
        """Return the value that `held` stands for; each node once."""
        if not isinstance(held, Node):
            return held
        if type(held) is Empty:  # one for all empty containers
            return held.put(now, self)
        value = self._done.get(id(held), ABSENT)
        if value is ABSENT:
            value = held.put(now, self)
            self._done[id(held)] = value
        return value

    def is_at_work(self, held: Node, value: Any) -> None:
        """Let a cycle that comes back to `held` find its value."""
        self._done[id(held)] = value


def put_attributes(attributes: dict[str, Any], before: dict[str, Any], putter: Putter) -> None:
    """Make attributes what they were."""
    putter.undo.append(partial(restore_attributes, attributes, attributes.copy()))
    for name, held in before.items():
        now = attributes.get(name, ABSENT)
        if now is not held:
            value = putter.put(held, now)
            if value is not now:
                attributes[name] = value
    if len(attributes) > len(before):
        for name in attributes.keys() - before.keys():
            del attributes[name]


def restore_attributes(attributes: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Make attributes what they were, by identity."""
    for name, value in before.items():
        if attributes.get(name, ABSENT) is not value:
            attributes[name] = value
    if len(attributes) > len(before):
        for name in attributes.keys() - before.keys():
            del attributes[name]


class Contents(Node):
    """A container: what was in it."""

    __slots__ = ("_base", "_id", "_kind", "_shell", "items")

    def __init__(self, container: Any, base: type) -> None:
        self._id = id(container)
        self._kind = type(container)
        self._base = base
        self.items: list[tuple[Any, Any]] = []
        self._shell = None
        if self._kind is not base or base is deque:  # what is no item: a length, a default
            self._shell = copy(container)
            base.clear(self._shell)  # type: ignore[attr-defined]

    def put(self, now: Any, putter: Putter) -> Any:
        """Fill it again, or one like it."""
        same = id(now) == self._id and type(now) is self._kind
        if self._base is tuple:
            return self._put_tuple(now if same else (), putter)
        container = now if same else self._empty()
        putter.is_at_work(self, container)
        before = now.copy() if same else {}
        if same:
            putter.undo.append(partial(_restore, now, before, self._base))
        made = self._made(dict(pairs_of(before)), putter)
        if not same or not _same_items(before, made):
            _fill(container, made, self._base)
        return container

    def _put_tuple(self, now: tuple[Any, ...], putter: Putter) -> Any:
        values = tuple(self._made(dict(enumerate(now)), putter).values())
        return now if _same_items(now, values) else self._kind(values)

    def _made(self, now: dict[Any, Any], putter: Putter) -> dict[Any, Any]:
        return {key: putter.put(held, now.get(key, ABSENT)) for key, held in self.items}

    def _empty(self) -> Any:
        return self._kind() if self._shell is None else copy(self._shell)


class Table(Node):
    """A large container: its items, as they are."""

    __slots__ = ("_base", "_id", "_items")

    def __init__(self, container: Any, base: type) -> None:
        self._id = id(container)
        self._base = base
        self._items = copy(container)

    def put(self, now: Any, putter: Putter) -> Any:
        """Fill it again where it changed, or one like it."""
        if id(now) != self._id or type(now) is not type(self._items):
            return copy(self._items)
        if not _same_items(now, self._items):
            putter.undo.append(partial(_restore, now, copy(now), self._base))
            _fill(now, self._items, self._base)
        else:
            putter.undo.append(partial(_restore, now, self._items, self._base))
        return now


def pairs_of(container: Any) -> Any:
    """Return keys and values; numbers are the keys of what has none."""
    return container.items() if isinstance(container, dict) else enumerate(container)


def _same_items(a: Any, b: Any) -> bool:
    """Whether two containers hold the very same things, keys and order included."""
    if len(a) != len(b):
        return False
    if isinstance(a, dict) and isinstance(b, dict):
        return all(map(is_, a, b)) and all(map(is_, a.values(), b.values()))
    if isinstance(a, (set, frozenset)):
        b = b.values() if isinstance(b, dict) else b
        return {id(x) for x in a} == {id(x) for x in b}
    return all(map(is_, a, b.values() if isinstance(b, dict) else b))


def _fill(container: Any, contents: Any, base: Any) -> None:
    base.clear(container)
    if base in (list, deque):
        base.extend(container, contents.values() if isinstance(contents, dict) else contents)
    elif base is set:
        base.update(container, contents.values() if isinstance(contents, dict) else contents)
    else:
        base.update(container, contents)


def _restore(container: Any, contents: Any, base: Any) -> None:
    if not _same_items(container, contents):
        _fill(container, contents, base)


class Empty(Node):
    """What stands for every empty container of a kind: most of a module's are empty."""

    __slots__ = ("_kind",)

    def __init__(self, kind: Any) -> None:
        self._kind = kind

    def put(self, now: Any, putter: Putter) -> Any:
        """Empty it again."""
        if type(now) is not self._kind or self._kind is tuple:
            return self._kind()
        putter.undo.append(partial(_restore, now, now.copy(), self._kind))
        now.clear()
        return now


EMPTY: dict[Any, Empty] = {kind: Empty(kind) for kind in PLAIN}


def undo_all(undo: Undo) -> None:
    """Run from the last to the first, and forget."""
    while undo:
        undo.pop()()
