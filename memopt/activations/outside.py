"""Tensors that autograd saves outside regions: moved through `saved_tensors_hooks`.

The embedding, the head and a loss inside the model save tensors too. Inside a region the
checkpoint's own hooks are on top, so these hooks see what lies between and after the regions.
Parameters, leaves and small tensors are passed through.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from memopt.activations.engine import ActivationEngine
from memopt.activations.modes import MIN_MOVE_BYTES
from memopt.activations.stored import Label, Stored
from memopt.activations.tensors import is_dense, is_plain, nbytes_of, storage_key
from memopt.types.plan import Placement


class _Ticket:
    """What the graph holds in place of a moved tensor; shared by equal saves."""

    __slots__ = ("__weakref__", "landed", "stored")

    def __init__(self, stored: Stored) -> None:
        self.stored: Stored | None = stored
        self.landed: Tensor | None = None


class OutsideHooks:
    """Pack and unpack hooks of one root forward.

    Args:
        engine: stores tensors.
        placement: "host" or "ssd"; "device" only measures.
        fixed: storage keys of parameters and buffers, which never move.
    """

    def __init__(self, engine: ActivationEngine, placement: Placement, fixed: set[int]) -> None:
        self._engine = engine
        self._placement = placement
        self._fixed = fixed
        self._tickets: dict[Any, tuple[Any, Any]] = {}
        self._seen: dict[int, Any] = {}
        self.saved_bytes = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        if not self._moves(tensor):
            return tensor
        storage = tensor.untyped_storage()
        key = (
            storage._cdata,
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            tensor._version,
        )
        self._count(storage)
        if self._placement == "device":
            return tensor
        known = self._tickets.get(key)
        if known is not None and known[0]() is storage:
            ticket = known[1]()
            if ticket is not None:
                return ticket
        stored = self._engine.store(
            tensor, self._placement, Label(region="", what="tensor saved outside regions"),
            clone_first=False,
        )  # fmt: skip
        if stored is None:
            return tensor
        ticket = _Ticket(stored)
        self._tickets[key] = (weakref.ref(storage), weakref.ref(ticket))
        return ticket

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _Ticket):
            return packed  # type: ignore[no-any-return]
        if packed.landed is None:
            assert packed.stored is not None
            packed.landed = packed.stored.take(keep=False)
            packed.stored = None
        return packed.landed

    def _moves(self, tensor: Tensor) -> bool:
        return (
            is_plain(tensor)
            and tensor.device == self._engine.device
            and not (tensor.is_leaf and tensor.requires_grad)
            and nbytes_of(tensor) >= MIN_MOVE_BYTES
            and is_dense(tensor)
            and storage_key(tensor) not in self._fixed
        )

    def saved_keys(self) -> set[int]:
        """Return the keys of the storages that were saved and are alive."""
        return {key for key, known in self._seen.items() if known() is not None}

    def _count(self, storage: Any) -> None:
        known = self._seen.get(storage._cdata)
        if known is None or known() is not storage:
            self._seen[storage._cdata] = weakref.ref(storage)
            self.saved_bytes += storage.nbytes()
