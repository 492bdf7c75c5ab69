"""Whether a call does with hollow outputs what the proof was made for.

A hollow op (skips.py) is proven by calls in which only stored ops read its outputs and nothing saves
them. Another call of the same region may do more with them: a branch that a step count switches on
reads them too, a weight that was thawed has them saved. Its recomputation would meet NaN there,
without a word. So every forward under a plan with hollow ops is watched: one that reads hollow
outputs in an op which is run again, or saves them, makes everything again.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.activations.tensors import is_plain, storage_key, tensors_in

if TYPE_CHECKING:
    from memopt.activations.frame import Frame


class HollowWatch:
    """Looks after the hollow outputs of one forward; what was not foreseen takes its skips away.

    Args:
        frame: the call; `frame.skips` becomes None.
    """

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._hooks: Any = None

    def begin(self) -> None:
        """See what autograd saves, in front of the checkpoint's own hooks."""
        top: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if top is None:
            return
        inner_pack, inner_unpack = top

        def pack(tensor: Tensor) -> Any:
            if self._storages and self._is_hollow(tensor):
                self._give_up()
            return inner_pack(tensor)

        self._hooks = torch.autograd.graph.saved_tensors_hooks(pack, inner_unpack)
        self._hooks.__enter__()

    def end(self) -> None:
        """The forward is over."""
        hooks, self._hooks = self._hooks, None  # they hold this object, and it the frame
        if hooks is not None:
            hooks.__exit__()

    def born(self, output: Tensor) -> None:
        """An output will not be made again."""
        self._storages[storage_key(output)] = weakref.ref(output.untyped_storage())

    def read(self, args: Any, out: Any, *, writes: bool) -> None:
        """An op that is run again had these arguments; that it makes views of them is no read."""
        if not self._storages:
            return
        hits = [storage_key(t) for t in tensors_in(args) if self._is_hollow(t)]
        if hits and (writes or any(storage_key(t) not in hits for t in tensors_in(out))):
            self._give_up()

    def _is_hollow(self, tensor: Tensor) -> bool:
        if not is_plain(tensor):
            return False
        storage = tensor.untyped_storage()
        known = self._storages.get(storage._cdata)
        return known is not None and known() is storage

    def _give_up(self) -> None:
        self._frame.skips = None
        self._storages.clear()
