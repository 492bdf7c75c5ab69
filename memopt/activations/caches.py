"""Key/value caches among a region's arguments: an empty one stays empty.

transformers gives its layers a cache in training too. A recomputed region would append to it a second time, and the
cache keeps every key and value alive, so that placing them elsewhere frees nothing. PyTorch's and transformers' own
checkpointing call the layer without it, which is another program: a cache makes its keys and values contiguous (an
empty tensor and they are concatenated), and for some shapes a GEMM over the views that it would get otherwise has other
last bits. So a region computes with an empty copy of its own, in forward and again in recomputation, which is dropped
at its end: the same ops as in the plain loop, and nobody's cache grows.

A cache is told by its class and not by its name (`past_key_values`; `cache` from transformers 5.24 on).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.utils._python_dispatch import _disable_current_modes

from memopt.activations.held import ATOMS

_LEGACY_ARGUMENTS = {
    "use_cache": False,
    "past_key_values": None,
    "past_key_value": None,
    "layer_past": None,
}
_COUNTER_ELEMENTS = 16
"""Larger tensors hold keys and values; smaller ones count, and may be counted up in place."""


class EmptyCaches:
    """The caches among the arguments of one call, as they were when it began."""

    def __init__(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        caches = {place: value for place, value in given if _is_cache(_kind(value))}
        self._caches = {place: _copy(cache) for place, cache in caches.items()}
        self.filled = bool(caches) and _holds_tokens(caches.values(), module)
        """Whether the call reads keys and values of earlier tokens: without them it is another call."""

    def given_to(
        self,
        plain: Callable[..., Any],
        on_filled: Callable[[Iterable[Tensor]], None] | None = None,
    ) -> Callable[..., Any]:
        """Return `plain`, called with fresh copies of the caches in their places.

        `on_filled` is called with the tensors that it left in them.
        """
        if not self._caches:
            return plain

        def call(*args: Any, **kwargs: Any) -> Any:
            positions = list(args)
            copies = {place: _copy(cache) for place, cache in self._caches.items()}
            for place, copy in copies.items():
                if isinstance(place, str):
                    kwargs[place] = copy
                else:
                    positions[place] = copy
            out = plain(*positions, **kwargs)
            if on_filled is not None:
                on_filled(_tensors_of(copies.values()))
            return out

        return call

    def taken_out(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
        """Return the arguments with None for the caches, and whether there were any.

        What older libraries have in place of a cache (tuples, a flag) is switched off for good.
        """
        bare = tuple(None if i in self._caches else value for i, value in enumerate(args))
        off: dict[str, Any] = {name: None for name in kwargs if name in self._caches}
        if not self._caches:
            off = {
                name: value
                for name, value in _LEGACY_ARGUMENTS.items()
                if kwargs.get(name) is not None and kwargs[name] is not value
            }
        return bare, {**kwargs, **off} if off else kwargs, bool(self._caches or off)


def _holds_tokens(caches: Iterable[Any], module: Module) -> bool:
    """Whether the module's own layers of the caches hold more than counters; all of them where it names none.

    Layers that are no regions, and regions that a plan leaves untouched, fill theirs.
    """
    names = (vars(part).get("layer_idx") for part in module.modules())
    own = {name for name in names if type(name) is int}
    found: dict[int, Any] = {}
    for cache in caches:
        for part in _parts(cache, own):
            _copy(part, found)
    return any(isinstance(t, Tensor) and t.numel() > _COUNTER_ELEMENTS for t in found.values())


def _tensors_of(caches: Iterable[Any]) -> list[Tensor]:
    """Return every tensor in these caches."""
    found: dict[int, Any] = {}
    for cache in caches:
        _copy(cache, found)
    return [t for t in found.values() if isinstance(t, Tensor)]


def _parts(cache: Any, own: set[int]) -> list[Any]:
    inner = [value for value in vars(cache).values() if _is_cache(_kind(value))]
    if inner:  # of an encoder-decoder: one for each kind of attention
        return [part for one in inner for part in _parts(one, own)]
    layers = vars(cache).get("layers")
    if not own or not isinstance(layers, list):
        return [cache]
    return [layers[index] for index in own if index < len(layers)]


def _copy(value: Any, done: dict[int, Any] | None = None) -> Any:
    """Return a copy of a cache: own containers, parts and counters, all else shared.

    `done` gets what was copied, by the ids of the originals.
    """
    done = {} if done is None else done
    if id(value) in done:
        return done[id(value)]
    out = value
    if isinstance(value, Tensor):
        if value.numel() <= _COUNTER_ELEMENTS:
            with _disable_current_modes():
                out = value.detach().clone()
    elif type(value) in (list, tuple):
        out = type(value)(_copy(item, done) for item in value)
    elif type(value) is dict:
        out = {key: _copy(item, done) for key, item in value.items()}
    elif type(value) is set:
        out = set(value)
    elif _is_part(_kind(value)):
        out = object.__new__(type(value))
        own = vars(value)
        vars(out).update({k: v if type(v) in ATOMS else _copy(v, done) for k, v in own.items()})
    else:
        return value
    done[id(value)] = out
    return out


def _kind(value: Any) -> Any:
    return type(value)


@functools.lru_cache(maxsize=1024)
def _is_cache(kind: Any) -> bool:
    return any(
        base.__module__ == "transformers.cache_utils" and base.__name__.endswith("Cache")
        for base in kind.__mro__
    )


@functools.lru_cache(maxsize=1024)
def _is_part(kind: Any) -> bool:
    return any(base.__module__ == "transformers.cache_utils" for base in kind.__mro__)
