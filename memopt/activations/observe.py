"""Recording a traced step: what every op of every region allocates, costs, and is needed for.

The observed forward mode runs the ops as the plain one does and asks three things more:
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

import hashlib
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import flop_registry

from memopt.activations.facts import OpFacts, facts_of
from memopt.activations.frame import Frame, InputSlot, PreImage
from memopt.activations.modes import MIN_MOVE_BYTES, ForwardMode
from memopt.activations.skips import Readers, readers_of
from memopt.activations.tensors import (
    digest,
    is_dense,
    is_plain,
    nbytes_of,
    only_views,
    storage_key,
    tensors_in,
)
from memopt.memory.meter import Meter
from memopt.types.trace import OpTrace, RegionTrace


@dataclass
class _Op:
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
    readers: set[int] = field(default_factory=set)
    needed: bool = False
    """Whether its outputs are written to, leave the region, or are used in a way that has no position."""


@dataclass
class _Birth:
    """A storage born in the region."""

    storage: weakref.ref[Any]
    op: _Op
    nbytes: int
    digest: Tensor | None


@dataclass
class Record:
    """One region call as observed."""

    name: str
    module: torch.nn.Module
    ops: list[_Op] = field(default_factory=list)
    num_ops: int = 0
    input_ids: list[tuple[int, int]] = field(default_factory=list)
    forward: list[Any] = field(default_factory=list)
    forward_peak_bytes: int = 0
    end_level_bytes: int = 0
    backward: list[Any] = field(default_factory=list)
    backward_peak_bytes: int = 0
    backward_level_bytes: int = 0
    hidden_nbytes: int = 0
    has_unseen_kernel: bool = False
    fragile: set[int] = field(default_factory=set)
    written_inputs: set[int] = field(default_factory=set)


class ObservedMode(ForwardMode):
    """A forward mode that places nothing and records everything."""

    def __init__(self, frame: Frame, engine: Any, record: Record, meter: Meter) -> None:
        super().__init__(frame, {}, frozenset(), engine.store, engine.device)
        self.record = record
        self._meter = meter
        self._births: dict[int, _Birth] = {}
        self._suspects: list[tuple[_Op, Tensor]] = []
        self._hooks: Any = None
        self._inputs: list[tuple[int, PreImage]] = []
        self.cloned_bytes = 0
        self._hidden: dict[int, weakref.ref[Any]] = {}
        self._known: set[int] = set()

    def __enter__(self) -> ObservedMode:
        """Push the mode and a pack hook in front of the checkpoint's."""
        leaves = self.frame.call_args or []
        self._inputs = [(i, PreImage(t)) for i, t in enumerate(leaves) if _may_be_written(t)]
        self.cloned_bytes = sum(nbytes_of(image.before) for _, image in self._inputs)
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
            return out
        op = _Op(position, facts, marks=(begin, end))
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

    def _born(self, op: _Op, out: Any, sources: set[int]) -> None:
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
            self._births[key] = _Birth(weakref.ref(tensor.untyped_storage()), op, nbytes, value)
        if op.facts.kind in ("factory", "random"):
            op.reason = f"a {op.facts.kind} op is always run again"

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
                birth.op.needed = True
            if birth is not None and birth.digest is not None and birth.storage() is not None:
                birth.digest = digest(_of_storage(birth.storage()))

    def _packed(self, tensor: Tensor) -> None:
        if not is_plain(tensor):
            return
        key = storage_key(tensor)
        birth = self._births.get(key)
        storage = tensor.untyped_storage()
        if birth is None or birth.storage() is not storage:
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
            changed = torch.stack([flag for _, flag in self._suspects]).tolist()
            for (op, _), flag in zip(self._suspects, changed, strict=True):
                if flag:
                    self.record.fragile.add(op.position)
        self._suspects.clear()
        for birth in self._births.values():
            birth.op.needed |= birth.storage() is not None
        self._births.clear()
        self._settle_inputs()

    def _settle_inputs(self) -> None:
        """Find arguments that changed without a visible write; recompute from their pre-image."""
        seen = {storage_key(image.target) for image in self.frame.pre_images}
        for index, image in self._inputs:
            if storage_key(image.target) in seen or not is_dense(image.target):
                continue
            if not torch.equal(digest(image.target), digest(image.before)):
                self.frame.pre_images.append(image)
                self.record.written_inputs.add(index)
        self._inputs = []


class RegionObserver:
    """The engine's observer during a traced step.

    Args:
        meter: memory and clock of the device.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.records: dict[str, Record] = {}
        self.peak_bytes = 0
        self.outside_peak_bytes = 0
        self.outside: Any = None
        self.outside_standing_bytes: int | None = None
        self._in_backward: Record | None = None
        self._last_ended: Record | None = None

    def begin_root(self) -> None:
        """A root forward starts: keep the records of the latest one."""
        self.close_backward()
        self.records = {}
        self._fold()

    def forward_mode(self, frame: Frame, engine: Any) -> ForwardMode:
        """Open a record."""
        record = Record(frame.name, frame.module)
        record.input_ids = [
            (id(slot.source if slot.source is not None else slot.stored), _slot_nbytes(slot))
            for slot in frame.inputs
            if isinstance(slot, InputSlot) and not slot.leaf
        ]
        self.records[frame.name] = record
        self._fold()
        record.end_level_bytes = self.meter.current_bytes()
        record.forward = [self.meter.mark()]
        return ObservedMode(frame, engine, record, self.meter)

    def forward_ended(self, frame: Frame, mode: Any) -> None:
        """Close the forward half."""
        record: Record = mode.record
        record.forward.append(self.meter.mark())
        record.num_ops = mode.position
        record.forward_peak_bytes = max(
            0, self._fold() - record.end_level_bytes - mode.cloned_bytes
        )
        record.end_level_bytes = self.meter.current_bytes()
        self._last_ended = record
        if self.outside is not None:
            self.outside_standing_bytes = self.outside.saved_bytes

    def recompute_begins(self, frame: Frame) -> None:
        """Close the backward of the region before, open this one's."""
        peak = self.close_backward()
        if self._last_ended is not None:
            self.outside_peak_bytes = max(0, peak - self._last_ended.end_level_bytes)
            self._last_ended = None
        record = self.records.get(frame.name)
        if record is None:
            return
        record.backward_level_bytes = self.meter.current_bytes()
        record.backward = [self.meter.mark()]
        self._in_backward = record

    def recompute_ended(self, frame: Frame) -> None:
        """Mark the end of the recomputation."""
        if self._in_backward is not None and len(self._in_backward.backward) == 1:
            self._in_backward.backward.append(self.meter.mark())

    def close_backward(self) -> int:
        """The region whose backward ran is done; return the peak since the last boundary."""
        peak = self._fold()
        record, self._in_backward = self._in_backward, None
        if record is not None and len(record.backward) == 2:
            record.backward.append(self.meter.mark())
            record.backward_peak_bytes = max(0, peak - record.backward_level_bytes)
        return peak

    def fragile(self) -> dict[str, frozenset[int]]:
        """Positions per region that an unseen kernel writes to."""
        return {r.name: frozenset(r.fragile) for r in self.records.values() if r.fragile}

    def readers(self) -> dict[str, Readers]:
        """Per region, where no kernel is unseen: ops that only other ops of it read, and which."""
        seen = (r for r in self.records.values() if not (r.fragile or r.hidden_nbytes))
        return {r.name: readers_of(r.ops) for r in seen if not r.has_unseen_kernel}

    def written_inputs(self) -> dict[str, frozenset[int]]:
        """Arguments per region, by place among its flattened ones, that it writes unseen."""
        return {
            r.name: frozenset(r.written_inputs) for r in self.records.values() if r.written_inputs
        }

    def region_traces(self) -> tuple[RegionTrace, ...]:
        """Return what was recorded, in forward order."""
        users: dict[int, int] = {}
        for record in self.records.values():
            for key, _ in record.input_ids:
                users[key] = users.get(key, 0) + 1
        return tuple(self._trace_of(r, users) for r in self.records.values())

    def _fold(self) -> int:
        peak = self.meter.take_peak()
        self.peak_bytes = max(self.peak_bytes, peak)
        return peak

    def _trace_of(self, record: Record, users: dict[int, int]) -> RegionTrace:
        seconds = self.meter.seconds
        ops = tuple(_op_trace(op, seconds) for op in record.ops if op.nbytes)
        digesting = sum(seconds(*op.digesting) for op in record.ops if op.digesting)
        back = record.backward
        names = [(op.facts.name, op.nbytes) for op in record.ops]
        inputs = sum(n for key, n in record.input_ids if users[key] == 1)
        saved = sum(op.saved_nbytes for op in record.ops)
        if (
            record.hidden_nbytes
        ):  # then what the region's own first ops save of its input is hidden too
            saved += record.hidden_nbytes + inputs
        parameters = {id(p): nbytes_of(p) for p in record.module.parameters() if p.requires_grad}
        return RegionTrace(
            name=record.name,
            group=hashlib.sha1(repr(names).encode(), usedforsecurity=False).hexdigest()[:12],
            input_nbytes=inputs,
            saved_nbytes=saved,
            ops=ops,
            num_ops=record.num_ops,
            forward_s=max(0.0, seconds(*record.forward) - digesting),
            recompute_s=seconds(back[0], back[1]) if len(back) > 1 else 0.0,
            backward_s=seconds(back[1], back[2]) if len(back) > 2 else 0.0,
            forward_peak_bytes=record.forward_peak_bytes,
            backward_peak_bytes=record.backward_peak_bytes,
            grad_nbytes=sum(parameters.values()),
            has_unseen_writer=bool(record.fragile),
        )


def _op_trace(op: _Op, seconds: Any) -> OpTrace:
    return OpTrace(
        position=op.position,
        op=op.facts.name,
        nbytes=op.nbytes,
        saved_nbytes=op.saved_nbytes,
        flops=op.flops,
        time_s=seconds(*op.marks) if op.marks else 0.0,
        kind=op.facts.kind,
        placeable=not op.reason,
        reason=op.reason,
    )


def _slot_nbytes(slot: InputSlot) -> int:
    if slot.stored is not None:
        return slot.stored.nbytes
    return nbytes_of(slot.source) if slot.source is not None and is_plain(slot.source) else 0


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
