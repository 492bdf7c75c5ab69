"""The forward mode of a traced step: what every op of a region allocates, costs, and is needed for.

It runs the ops as the plain forward mode does and asks three things more:
- which outputs does autograd keep? (a pack hook in front of the checkpoint's own); what it keeps
  that no op was seen to return (compiled code hides its ops) counts for the region as a whole;
- how long did each op take, and how many FLOPs was it?
- did anything write to an output that the dispatcher did not see (a Triton kernel, numpy)? Every
  fresh output is digested at birth, and again whenever an op or autograd takes it and at the
  region's end. A storage that changed without a visible write is *fragile*: it is copied at
  birth wherever it is stored.
Digests cost one read of each tensor per use, once, in the first step.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import flop_registry

from memopt.activations.facts import OpFacts, facts_of
from memopt.activations.frame import Frame, PreImage
from memopt.activations.modes import MIN_MOVE_BYTES, ForwardMode
from memopt.activations.tensors import (
    digest,
    is_dense,
    is_plain,
    nbytes_of,
    only_views,
    shared_alias,
    storage_key,
    tensors_in,
)
from memopt.memory.meter import Meter


@dataclass
class Op:
    """One op as observed."""

    position: int
    facts: OpFacts
    nbytes: int = 0
    flops: int = 0
    marks: tuple[Any, Any] | None = None
    digesting: tuple[Any, Any] | None = None
    reason: str = ""
    saved: set[int] = field(default_factory=set)
    saved_nbytes: int = 0
    rewritten: bool = False
    freed_at: int | None = None
    readers: set[int] = field(default_factory=set)
    needed: bool = False
    """Whether its outputs are written to, leave the region, or are used in a way that has no position."""


@dataclass
class _Birth:
    """A storage born in the region."""

    storage: weakref.ref[Any]
    op: Op
    nbytes: int
    digest: Tensor | None
    versions: Tensor | None


@dataclass
class Record:
    """One region call as observed."""

    name: str
    module: torch.nn.Module
    ops: list[Op] = field(default_factory=list)
    num_ops: int = 0
    input_ids: list[tuple[int, int, int]] = field(default_factory=list)
    """Identity, bytes and storage key of each tensor that enters."""
    input_outside: set[int] = field(default_factory=set)
    """Storage keys among them that autograd saved outside regions before."""
    input_op: int | None = None
    beside_nbytes: int = 0
    begin_bytes: int = 0
    """Held when its forward began, above the root's start and but for gradients of parameters."""
    end_bytes: int = 0
    entry_bytes: int | None = None
    """The same when it ended, and when the recompute began."""
    new_grad_bytes: int = 0
    """Gradients of parameters made by then."""
    inputs_stand: bool = False
    packed: set[int] = field(default_factory=set)
    """Storage keys that autograd keeps for the region and that were born outside it."""
    cast_nbytes: int = 0
    cached_nbytes: int = 0
    outlived: list[tuple[weakref.ref[Any], int]] = field(default_factory=list)
    """Storages that were alive when its forward ended, with the position of their op."""
    forward: list[Any] = field(default_factory=list)
    forward_peak_bytes: int = 0
    end_level_bytes: int = 0
    backward: list[Any] = field(default_factory=list)
    recompute_peak_bytes: int = 0
    backward_peak_bytes: int = 0
    backward_level_bytes: int = 0
    hidden_nbytes: int = 0
    has_unseen_kernel: bool = False
    fragile: set[int] = field(default_factory=set)
    written_inputs: set[int] = field(default_factory=set)
    written_buffers: set[int] = field(default_factory=set)
    returned: list[tuple[Op, Tensor, int]] = field(default_factory=list)
    """Outputs alive when the region returned: the op, what shares the version, and the version then."""

    def find_changed(self) -> None:
        """The backward begins: what the caller wrote to meanwhile cannot be kept for it, nor copied beside it."""
        for op, versions, before in self.returned:
            if versions._version != before:
                op.reason = "returned by the region and changed in place by its caller"
        self.returned.clear()


class Tracing(Protocol):
    """What the mode needs of the observer."""

    meter: Meter
    tracing_bytes: int


class ObservedMode(ForwardMode):
    """A forward mode that places nothing and records everything."""

    def __init__(self, frame: Frame, engine: Any, record: Record, observer: Tracing) -> None:
        super().__init__(frame, {}, frozenset(), engine.store, engine.device)
        self.record = record
        self._observer = observer
        self._meter = observer.meter
        self._births: dict[int, _Birth] = {}
        self._suspects: list[tuple[Op, Tensor]] = []
        self._hooks: Any = None
        self._inputs: list[tuple[set[int], int, PreImage]] = []
        """What numbered arguments and buffers are before the forward; where to note those that changed."""
        self.cloned_bytes = 0
        self._hidden: dict[int, weakref.ref[Any]] = {}
        self._known: set[int] = set()
        self._casts: list[weakref.ref[Any]] = []

    def __enter__(self) -> ObservedMode:
        """Push the mode and a pack hook in front of the checkpoint's."""
        leaves = self.frame.call_args or []
        buffers = [buffer for _, _, buffer in self.frame.buffers]
        notes = (self.record.written_inputs, leaves), (self.record.written_buffers, buffers)
        self._inputs = [
            (written, i, PreImage(t))
            for written, tensors in notes
            for i, t in enumerate(tensors)
            if _may_be_written(t)
        ]
        self.cloned_bytes = sum(nbytes_of(image.before) for _, _, image in self._inputs)
        self._observer.tracing_bytes += self.cloned_bytes
        states = (*self.frame.module.parameters(), *self.frame.module.buffers())
        self._known = {storage_key(t) for t in tensors_in((leaves, states)) if is_plain(t)}
        super().__enter__()
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if top is not None:
            inner_pack, inner_unpack = top

            def pack(tensor: Tensor) -> Any:
                self._packed(tensor)
                return inner_pack(tensor)

            self._hooks = torch.autograd.graph.saved_tensors_hooks(pack, inner_unpack)
            self._hooks.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        """Pop both and settle which storages changed unseen."""
        if self._hooks is not None:
            self._hooks.__exit__(*exc)
            self._hooks = None
        super().__exit__(*exc)
        self._settle()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the op as `ForwardMode` does, with a mark on either side."""
        position = self.position
        sources = {storage_key(t) for t in tensors_in((args, kwargs)) if is_plain(t)}
        self._verify(sources)
        begin = self._meter.mark()
        out = super().__torch_dispatch__(func, types, args, kwargs)
        end = self._meter.mark()
        facts = facts_of(func)
        if self.position == position:
            if not facts.unnumbered:
                self._used(sources, None)
            if facts.casts and is_plain(out):
                self._casts.append(weakref.ref(out.untyped_storage()))
            return out
        op = Op(position, facts, marks=(begin, end))
        op.flops = _flops(func, args, kwargs or {}, out)
        written = [args[i] for i in facts.written_args if i < len(args)]
        written += [kwargs[k] for k in facts.written_kwargs if kwargs and k in kwargs]
        rewritten = {storage_key(t) for t in tensors_in(written) if is_plain(t)}
        self._rewritten(rewritten)
        if facts.writes or not only_views(out, sources):
            self._used(sources - rewritten, position)
        self._born(op, out, sources)
        op.digesting = (end, self._meter.mark())
        self.record.ops.append(op)
        return out

    def _born(self, op: Op, out: Any, sources: set[int]) -> None:
        outputs = list(tensors_in(out))
        if not outputs:
            op.reason = "returns no tensor"
        for tensor in outputs:
            if not is_plain(tensor):
                op.reason = f"returns a {type(tensor).__name__}"
                continue
            key = storage_key(tensor)
            if key in sources and tensor.numel():
                op.reason = "returns a view of its input"
                continue
            if not is_dense(tensor):
                op.reason = "returns a tensor with gaps"
            nbytes = tensor.untyped_storage().nbytes()
            op.nbytes += nbytes
            value = None
            if op.facts.kind != "factory" and nbytes >= MIN_MOVE_BYTES:
                value = digest(_whole(tensor))
            storage = weakref.ref(tensor.untyped_storage(), partial(self._freed, op))
            self._births[key] = _Birth(storage, op, nbytes, value, _versions_of(tensor))
        if op.facts.kind in ("factory", "random"):
            op.reason = f"a {op.facts.kind} op is always run again"

    def _freed(self, op: Op, _: Any) -> None:
        op.freed_at = self.position  # of several outputs the last one counts

    def _verify(self, keys: set[int]) -> None:
        """Compare storages that are about to be used with what they were at birth."""
        for key in keys:
            birth = self._births.get(key)
            if birth is None or birth.digest is None:
                continue
            storage = birth.storage()
            if storage is None:
                del self._births[key]
                continue
            now = digest(_of_storage(storage))
            self._suspects.append((birth.op, (now != birth.digest).any()))

    def _used(self, keys: set[int], position: int | None) -> None:
        """An op reads these storages; what `empty` made and nobody was seen to write, was written unseen."""
        for key in keys:
            birth = self._births.get(key)
            if birth is None:
                continue
            if position is None:
                birth.op.needed = True
            else:
                birth.op.readers.add(position)
            if birth.op.facts.kind == "factory" and "empty" in birth.op.facts.name:
                self.record.has_unseen_kernel |= not birth.op.needed

    def _rewritten(self, keys: set[int]) -> None:
        """A write that the dispatcher showed: the storage has a new value by right."""
        for key in keys:
            birth = self._births.get(key)
            if birth is not None:
                birth.op.needed = birth.op.rewritten = True
            if birth is not None and birth.digest is not None and birth.storage() is not None:
                birth.digest = digest(_of_storage(birth.storage()))

    def _packed(self, tensor: Tensor) -> None:
        if not is_plain(tensor):
            return
        key = storage_key(tensor)
        birth = self._births.get(key)
        storage = tensor.untyped_storage()
        if birth is None or birth.storage() is not storage:
            self.record.packed.add(key)
            hidden = self._hidden.get(key)
            if key not in self._known and (hidden is None or hidden() is not storage):
                self._hidden[key] = weakref.ref(storage)
                self.record.hidden_nbytes += storage.nbytes()
            return
        with _disable_current_modes():
            self._verify({key})
        self._used({key}, None)
        if key not in birth.op.saved:
            birth.op.saved.add(key)
            birth.op.saved_nbytes += birth.nbytes

    def _settle(self) -> None:
        self._verify(set(self._births))
        if self._suspects:
            for op, flag in zip((op for op, _ in self._suspects), self._flags(), strict=True):
                if flag:
                    self.record.fragile.add(op.position)
        self._suspects.clear()
        for birth in self._births.values():
            storage = birth.storage()
            if storage is not None:
                birth.op.needed = True
                birth.op.freed_at = self.position
                self.record.outlived.append((weakref.ref(storage), birth.op.position))
                if birth.versions is not None:
                    returned = birth.op, birth.versions, birth.versions._version
                    self.record.returned.append(returned)
        self._births.clear()
        alive = {id(s): s for s in (ref() for ref in self._casts) if s is not None}
        self.record.cast_nbytes = sum(storage.nbytes() for storage in alive.values())
        self._casts.clear()
        self._settle_inputs()

    def cached(self, tensors: Iterable[Tensor]) -> None:
        """Count what the region left in a cache; an untouched call leaves it in the program's own."""
        for key in {storage_key(t) for t in tensors if is_plain(t)}:
            birth = self._births.get(key)
            if birth is not None and birth.storage() is not None and key not in birth.op.saved:
                self.record.cached_nbytes += birth.nbytes

    def _flags(self) -> list[bool]:
        """Bring the suspects' flags home, in one copy a device: attention's seeds are CPU tensors beside CUDA's."""
        flags = [flag for _, flag in self._suspects]
        values: dict[int, bool] = {}
        for device in {flag.device for flag in flags}:
            here = [i for i, flag in enumerate(flags) if flag.device == device]
            values |= zip(here, torch.stack([flags[i] for i in here]).tolist(), strict=True)
        return [values[i] for i in range(len(flags))]

    def _settle_inputs(self) -> None:
        """Find what changed without a visible write; recompute from its pre-image."""
        seen = {storage_key(image.target) for image in self.frame.pre_images}
        for written, index, image in self._inputs:
            if storage_key(image.target) in seen or not is_dense(image.target):
                continue
            if not torch.equal(digest(image.target), digest(image.before)):
                self.frame.pre_images.append(image)
                written.add(index)
        self._inputs = []
        self._observer.tracing_bytes -= self.cloned_bytes


def _versions_of(tensor: Tensor) -> Tensor | None:
    """Return an empty tensor that shares the version counter, and keeps no memory alive."""
    if tensor.is_inference():
        return None
    with _disable_current_modes():
        alias = shared_alias(tensor)
        alias.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias


def _whole(tensor: Tensor) -> Tensor:
    return _of_storage(tensor.untyped_storage())


def _of_storage(storage: Any) -> Tensor:
    """Return all bytes of a storage as a tensor."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _may_be_written(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and is_plain(value)
        and not isinstance(value, torch.nn.Parameter)
        and not (value.is_leaf and value.requires_grad)
        and value.numel() > 0
    )


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    formula = flop_registry.get(getattr(func, "_overloadpacket", None))
    if formula is None:
        return 0
    try:
        return int(formula(*args, **kwargs, out_val=out))
    except (TypeError, ValueError, AssertionError):
        return 0
