"""Ops that nothing left needs are not run again.

With a softmax stored, the product before it has no reader left in the recompute; with rotated
queries stored, neither has the projection. The traced step says which ops are read by which
(observe.py); under a plan, an op is *hollow* if nothing saves its outputs and every op that reads
them is answered from storage, or hollow itself. A hollow op returns a tensor of the right shape
full of NaN.

The dispatcher does not see every reader (Triton kernels, numpy, extensions called past it), so
that is not believed, it is tried: before the first recompute of a region under a plan, the region
is run once more with hollow ops answered, and everything that it packs for autograd is digested
and compared with what the true recompute packs. Only equal digests make the ops skipped from then
on; a read that nobody showed meets NaN and leaves other bits. Regions with kernels known to be
unseen are left out from the start, as are outputs that are no floating-point numbers (a NaN is no
index that could send a kernel astray).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.activations.modes import RecomputeMode
from memopt.activations.tensors import digest, is_dense, is_plain

if TYPE_CHECKING:
    from memopt.activations.frame import Frame

Readers = Mapping[int, tuple[str, frozenset[int]]]
"""Position of an op -> its name, and the positions of the ops that read its outputs."""


def readers_of(ops: Iterable[Any]) -> Readers:
    """Return the ops, as observed, that nothing but other ops of the region needs."""
    return {
        op.position: (op.facts.name, frozenset(op.readers))
        for op in ops
        if op.nbytes
        and op.readers
        and not (op.needed or op.saved or op.reason)
        and op.facts.kind != "attention"
    }


def unneeded(readers: Readers, answered: Iterable[int]) -> dict[int, str]:
    """Return positions and names of the ops whose readers are all answered or unneeded themselves."""
    given = set(answered)
    found: dict[int, str] = {}
    for position in sorted(readers, reverse=True):
        name, by = readers[position]
        if position not in given and by and by <= given | found.keys():
            found[position] = name
    return found


class RegionSkips:
    """The hollow ops of one region under one plan, and whether they are proven.

    Args:
        readers: of the region's ops, as traced.
        answered: positions that the plan stores.
        notes: told once what is skipped, or why not.
    """

    def __init__(self, readers: Readers, answered: Iterable[int], notes: dict[str, None]) -> None:
        self.hollow = unneeded(readers, answered)
        self.of = readers, frozenset(answered)
        self._readers = readers
        self._notes = notes
        self._proven: set[Any] = set()
        self.refuted = False
        """Whether a rehearsal showed that something else reads a hollow op."""

    def prune(self, frame: Frame) -> None:
        """The forward is over: an op whose reader was not stored after all runs again."""
        for position in sorted(self.hollow, reverse=True):
            if not all(by in frame.answers for by in self._readers[position][1]):
                frame.answers.pop(position, None)

    def is_proven(self, frame: Frame) -> bool:
        """Whether a rehearsal showed that this call's hollow ops are not needed."""
        return not self.refuted and _key(frame) in self._proven

    def rehearsal(self, frame: Frame) -> Rehearsal | None:
        """Return the proof to try; None where there is nothing to prove, or it cannot be repeated."""
        if self.refuted or frame.pre_images or frame.generators or not _key(frame):
            return None
        return Rehearsal(frame, self)

    def conclude(self, frame: Frame, *, needed: bool) -> None:
        """Note the outcome of a rehearsal."""
        if needed:
            self.refuted = True
            names = ", ".join(sorted({self.hollow[p] for p, _ in _key(frame)}))
            self._notes[f"{names}: read by something that PyTorch does not see; run again"] = None
        else:
            self._proven.add(_key(frame))
            self._notes["outputs that only stored ops read are not made again"] = None


def _key(frame: Frame) -> tuple[Any, ...]:
    return tuple(
        (position, tuple(part.key for part in answer.parts))
        for position, answer in sorted(frame.answers.items())
        if answer.hollow
    )


class Rehearsal:
    """One run with hollow ops answered, beside one with all of them run: what do they pack?"""

    def __init__(self, frame: Frame, skips: RegionSkips) -> None:
        self._frame = frame
        self._skips = skips
        self._without: list[Tensor | None] = []
        self._truly: list[Tensor | None] = []
        self._hooks: Any = None
        self._failed = False

    def run(self) -> None:
        """Run the region with hollow ops answered; nothing of it is kept but digests."""
        frame = self._frame

        def pack(tensor: Tensor) -> int:
            self._without.append(_digest_of(tensor))
            return 0

        assert frame.call is not None
        try:
            with (
                torch.autograd.graph.saved_tensors_hooks(pack, _never),
                RecomputeMode(frame, keep=True, skip=True),
            ):
                frame.call(frame.landed[-1])
        except Exception:  # noqa: BLE001 - whatever NaN led to, it was read
            self._failed = True

    def watch(self) -> None:
        """Digest what the true recompute packs; call when its own hooks are in place."""
        top: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if top is None:
            self._failed = True
            return
        inner_pack, inner_unpack = top

        def pack(tensor: Tensor) -> Any:
            self._truly.append(_digest_of(tensor))
            return inner_pack(tensor)

        self._hooks = torch.autograd.graph.saved_tensors_hooks(pack, inner_unpack)
        self._hooks.__enter__()

    def end(self, *, whole: bool) -> None:
        """The true recompute is over: compare, unless an error ended it before it had packed everything."""
        hooks, self._hooks = self._hooks, None  # they hold this object, and it the frame
        if hooks is not None:
            hooks.__exit__()
        if not whole:
            return
        pairs = list(zip(self._without, self._truly, strict=False))
        same = bool(pairs) and len(pairs) == len(self._truly) and not self._failed
        same = same and all(a is not None and b is not None and _equal(a, b) for a, b in pairs)
        self._without, self._truly = [], []
        self._skips.conclude(self._frame, needed=not same)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and torch.equal(a, b)


def _digest_of(tensor: Tensor) -> Tensor | None:
    """Return a digest of the tensor's values; None for what has none."""
    if not is_plain(tensor) or tensor.layout is not torch.strided:
        return None
    with torch.no_grad(), torch.utils._python_dispatch._disable_current_modes():
        tensor = tensor.resolve_conj().resolve_neg()
        return digest(tensor if is_dense(tensor) else tensor.contiguous())


def _never(packed: Any) -> Any:
    """Unpack: a rehearsal has no backward."""
    assert not packed, "a rehearsal has no backward"
    return packed
