"""What a region reads that is neither an argument, a weight nor a buffer: put back for its recompute.

A forward is Python, and Python reads what it likes: `self.training`, the name of the active
adapter, a scale that a schedule sets, a list that it appends its auxiliary loss to, hooks that were
there for one call, which attention kernels are allowed. Any of it may be another when backward
comes: two adapters used before one backward gave gradients of the second twice, without a word.

So a frame takes down (held.py) the attributes of the region's modules, the objects among its
arguments, what the modules' code names in globals, closures and classes (reach.py), which parameters
require gradients, and a few of PyTorch's global flags. A recomputation starts from these, and leaves
what it found: appended twice, counted twice would be other programs too. What lies elsewhere (behind
extension types, deeper than a few levels) is not put back; witness.py finds it in the traced step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import parametrize

from memopt.activations.held import ATOMS, Taker, is_state
from memopt.activations.put_back import ABSENT, EMPTY, PLAIN, Putter, Undo, restore_attributes
from memopt.activations.reach import Place, places_of_class, places_of_function

_ELSEWHERE = frozenset(
    {
        "_parameters", "_buffers", "_non_persistent_buffers_set", "_state_dict_hooks",
        "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
    }
)  # fmt: skip
_CALLS = ("forward", "_compiled_call_impl")


class Surroundings:
    """The Python state around one region call, as it was when the call began.

    Args:
        modules: the region, then those inside it.
        parameters: theirs.
    """

    __slots__ = ("_attributes", "_flags", "_owners", "_places", "_requires_grad", "_taker")

    def __init__(self, modules: list[Module], parameters: Iterable[Tensor]) -> None:
        self._places: dict[Any, tuple[Place, Any]] = {}
        self._taker: Taker | None = Taker(self._reach)
        self._owners = self._taker.owners
        self._attributes = [(m.__dict__, self._held_attributes(m.__dict__)) for m in modules]
        for name in _CALLS:  # the region's own, where memopt's patch is
            self._attributes[0][1].pop(name, None)
        for cls in {type(m) for m in modules}:
            self._add(places_of_class(cls))
        self._requires_grad = [(p, p.requires_grad) for p in parameters]
        self._flags = _flags()

    def take_arguments(self, leaves: list[Any]) -> list[Any]:
        """Return the call's arguments, objects of the program's own replaced by what stands for them.

        They are the last to be taken down.
        """
        assert self._taker is not None
        taken = [self._taker.take(leaf) if is_state(leaf) else leaf for leaf in leaves]
        self._taker = None
        return taken

    def _held_attributes(self, attributes: dict[str, Any]) -> dict[str, Any]:
        """Return what stands for a module's attributes; every region call pays for it."""
        assert self._taker is not None
        take = self._taker.take
        found = {}
        for name, value in attributes.items():
            kind = type(value)
            if kind in ATOMS:
                found[name] = value
            elif kind in PLAIN and not value:
                found[name] = EMPTY[kind]
            elif name not in _ELSEWHERE:
                found[name] = take(value)
        return found

    def _reach(self, function: Any) -> None:
        self._add(places_of_function(function))

    def _add(self, places: Iterable[Place]) -> None:
        assert self._taker is not None
        for place in places:
            if place.key not in self._places:
                value = place.read()
                self._places[place.key] = place, None
                self._places[place.key] = place, self._taker.take(value, 1)

    def swap_in(self, undo: Undo) -> Putter:
        """Put the state of the call in place; `undo`, run from its end, puts back what stood there."""
        putter = Putter(undo)
        for place, held in self._places.values():
            now = place.read()
            value = putter.put(held, now)
            undo.append(partial(_put_place, place, now))
            if value is not now:
                place.write(value)
        for owner in self._owners:
            putter.put(owner, owner)
        for attributes, before in self._attributes:
            _put_module(attributes, before, putter)
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
        return putter


def _put_module(attributes: dict[str, Any], before: dict[str, Any], putter: Putter) -> None:
    """Make a module's attributes what they were; most of its containers were and are empty."""
    found = attributes.copy()
    putter.undo.append(partial(restore_attributes, attributes, found))
    empty = []
    for name, held in before.items():
        now = found.get(name, ABSENT)
        if now is held:
            continue
        if held is EMPTY.get(type(now), ABSENT) and not now:
            empty.append(now)
            continue
        value = putter.put(held, now)
        if value is not now:
            attributes[name] = value
    for name in attributes.keys() - before.keys() - _ELSEWHERE:
        if name not in _CALLS:
            del attributes[name]
    putter.undo.append(partial(_empty_again, empty))


def _empty_again(containers: list[Any]) -> None:
    for container in containers:
        if container:
            container.clear()


def _put_place(place: Place, value: Any) -> None:
    if place.read() is not value:
        place.write(value)


def _set_parametrize_cache(count: int) -> None:
    vars(parametrize)["_cache_enabled"] = count


def _swap_cache(enabled: int, undo: Undo) -> None:
    """Weights that `parametrize.cached()` computed once are computed once in the recompute too."""
    if enabled:
        cache = parametrize._cache
        undo.append(partial(restore_attributes, cache, dict(cache)))
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
