"""An independent count of live tensor bytes on the CPU, to check memopt's own accounting against."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that ops made while the mode was active and that are still alive.

    Every op output's storage is held by a weak reference; what has expired is dropped when somebody asks. Storages
    from before the mode (parameters, batches) are not counted; gradients and everything that memopt allocates through
    PyTorch are.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_bytes = 0

    @property
    def current_bytes(self) -> int:
        """Bytes alive now."""
        self._sizes = {key: item for key, item in self._sizes.items() if not item[0].expired()}
        return sum(size for _, size in self._sizes.values())

    def reset_peak(self) -> None:
        """Start a new phase."""
        self.peak_bytes = self.current_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        inputs = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and id(leaf) not in known and leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                if storage._cdata not in inputs:
                    self._sizes[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)
        return out


@contextlib.contextmanager
def live_bytes() -> Iterator[LiveBytes]:
    """Count while the block runs."""
    with LiveBytes() as mode:
        yield mode


def settle() -> None:
    """Wait for the device. No garbage collection: what only a cycle keeps alive is a leak."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
