"""Region inputs that several regions take (rotary tables, masks, an encoder's output): moved once."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import Tensor

from memopt.activations.stored import Stored
from memopt.activations.tensors import version_of


class SharedInput:
    """A region input that several regions take: out once, freed after its last user."""

    def __init__(self, stored: Stored) -> None:
        self.nbytes = stored.nbytes
        self.num_users = 1
        self._stored = stored
        self._landed: Tensor | None = None

    @property
    def fetch_bytes(self) -> int:
        """None where other regions wait for it too, or it is on the device for one that did.

        What many regions take (rotary tables, masks) is on its way once for all of them and in no
        plan's window: counting it there would leave the last tensor of every region behind.
        """
        is_shared = self.num_users > 1 or self._landed is not None
        return 0 if is_shared else self._stored.fetch_bytes

    def prefetch(self) -> int:
        """Start the fetch unless a region still holds the landed tensor."""
        return 0 if self._landed is not None else self._stored.prefetch()

    def protect(self) -> None:
        """Pass on."""
        self._stored.protect()

    def settle(self) -> None:
        """Pass on."""
        self._stored.settle()

    def take(self, *, keep: bool) -> Tensor:
        """Return the tensor; it stays on the device until its last region took it."""
        self.num_users -= 1
        tensor, self._landed = self._landed, None
        if tensor is None:
            tensor = self._stored.take(keep=keep)
        if self.num_users > 0:
            self._landed = tensor
        return tensor.detach()


class SharedInputs:
    """The inputs that went out in one root forward, by the tensor object that they were."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, weakref.ref[SharedInput]]] = {}

    def clear(self) -> None:
        """Another root forward begins: what went out belongs to its frames."""
        self._known.clear()

    def out(self, tensor: Tensor, store: Callable[[], Stored | None]) -> SharedInput | None:
        """Return what stands for `tensor`: one more user of what went out, or what `store` moves now."""
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == version_of(tensor):
            shared = known[2]()
            if shared is not None:
                shared.num_users += 1
                return shared
        stored = store()
        if stored is None:
            return None
        shared = SharedInput(stored)
        self._known[id(tensor)] = weakref.ref(tensor), version_of(tensor), weakref.ref(shared)
        return shared
