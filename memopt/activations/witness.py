"""A witness of a region's forward: were its ops given the same in recomputation?

A recomputation that reads a global number, or an object's attribute, that changed meanwhile runs
the same ops on other numbers: nothing in the op list shows it. So in the traced step, and in every
step under `strict=True`, each op's plain arguments are noted, and the tensors that come from
neither the region's arguments, its weights, nor its own ops. In recomputation an op that is given
others raises. Results are not compared: kernels that sum by atomics differ by right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from memopt.activations.tensors import (
    digest,
    is_dense,
    is_plain,
    shared_alias,
    storage_key,
    version_of,
)

_PLAIN = frozenset({int, float, bool, str, complex, type(None), torch.dtype, torch.device})


class Witness:
    """What the ops of one region call were given, in order.

    Args:
        known: storages of the region's arguments, weights and buffers.
    """

    def __init__(self, known: set[int]) -> None:
        self._known = known
        self._seen: list[tuple[list[Any], dict[int, tuple[Tensor, int, Tensor | None]]]] = []

    def see(self, args: tuple[Any, ...], kwargs: Any, born: set[int]) -> None:
        """Note an op of the forward, before it runs."""
        plain: list[Any] = []
        tensors: list[Tensor] = []
        _split((args, kwargs or {}), plain, tensors)
        foreign = {}
        for index, tensor in enumerate(tensors):
            if not is_plain(tensor):
                continue
            key = storage_key(tensor)
            if key not in born and key not in self._known:
                alias = shared_alias(tensor)
                foreign[index] = alias, version_of(alias), _digest_of(alias)
        self._seen.append((plain, foreign))

    def change(self, position: int, args: tuple[Any, ...], kwargs: Any, own: set[int]) -> str:
        """Return what is another now, in words; empty where nothing is.

        Args:
            position: of the op.
            args: what it is given now.
            kwargs: the same, by name.
            own: storages that the region's forward wrote itself.
        """
        if position >= len(self._seen):
            return ""
        before, foreign = self._seen[position]
        plain: list[Any] = []
        tensors: list[Tensor] = []
        _split((args, kwargs or {}), plain, tensors)
        for old, new in zip(before, plain, strict=False):
            if type(old) is not type(new) or (old != new and (old == old or new == new)):  # noqa: PLR0124 - NaN
                return f"got {new!r} where the forward had {old!r}"
        for index, (alias, version, value) in foreign.items():
            if index >= len(tensors) or storage_key(alias) in own:
                continue
            if not _same(alias, version, value, tensors[index]):
                return (
                    f"got another tensor of shape {tuple(tensors[index].shape)} than the forward, "
                    "which is no argument, weight or buffer of the region"
                )
        return ""


def _digest_of(tensor: Tensor) -> Tensor | None:
    """Return a digest where it can be had without a copy: numpy and `.data` write without a new version."""
    with _disable_current_modes():
        return digest(tensor) if is_dense(tensor) else None


def _same(before: Tensor, version: int, value: Tensor | None, now: Tensor) -> bool:
    if version_of(before) != version:
        return False
    with _disable_current_modes():
        if value is not None and not torch.equal(digest(before), value):
            return False
    if not is_plain(now) or (before.shape, before.dtype) != (now.shape, now.dtype):
        return False
    if before.data_ptr() == now.data_ptr() and before.stride() == now.stride():
        return True
    with _disable_current_modes():
        before, now = before.resolve_conj().resolve_neg(), now.detach().resolve_conj().resolve_neg()
        before = before if is_dense(before) else before.contiguous()
        now = now if is_dense(now) and now.stride() == before.stride() else now.contiguous()
        if now.stride() != before.stride():
            before = before.contiguous()
        return torch.equal(digest(before), digest(now))


def _split(value: Any, plain: list[Any], tensors: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        tensors.append(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _split(item, plain, tensors)
    elif isinstance(value, dict):
        for item in value.values():
            _split(item, plain, tensors)
    elif type(value) in _PLAIN:
        plain.append(value)
