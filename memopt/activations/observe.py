"""Recording a traced step, region by region: levels, peaks and times at the boundaries.

The ops inside a region are seen by its forward mode (observed_mode.py). From both come the
RegionTraces, of a step that ended or of one that is still on its way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import Module

from memopt.activations.frame import Frame, InputSlot
from memopt.activations.modes import ForwardMode
from memopt.activations.observed_mode import ObservedMode, Op, Record
from memopt.activations.skips import Readers, readers_of
from memopt.activations.tensors import is_plain, nbytes_of
from memopt.memory.meter import CpuMeter, Meter
from memopt.types.trace import OpTrace, RegionTrace


class RegionObserver:
    """The engine's observer during a traced step.

    Args:
        meter: memory and clock of the device.
        grad_bytes: bytes of the parameters' gradients now; None: levels are not explained.
        all_grad_bytes: of the gradients when all exist.
    """

    def __init__(
        self, meter: Meter, grad_bytes: Callable[[], int] | None = None, all_grad_bytes: int = 0
    ) -> None:
        self.meter = meter
        # where copies are on their way it cannot be told what a level consists of
        self._grad_bytes = grad_bytes if isinstance(meter, CpuMeter) else None
        self._all_grad_bytes = all_grad_bytes
        self._root_grad_bytes = 0
        self._root_bytes = self._around = 0
        self.turning_bytes = 0
        """At the end of the last region's forward: what no figure explains."""
        self.records: dict[str, Record] = {}
        self.peak_bytes = 0
        self.tracing_bytes = 0
        """Bytes that may be alive only because the step is traced."""
        self.outside_peak_bytes = 0
        self.outside: Any = None
        self.outside_standing_bytes: int | None = None
        self._in_backward: Record | None = None
        self._last_ended: Record | None = None
        self._mode: ObservedMode | None = None

    def begin_root(self) -> None:
        """A root forward starts: keep the records of the latest one."""
        self.close_backward()
        self.records = {}
        self.tracing_bytes = 0
        self._fold()
        self._root_bytes = self._held_bytes()
        self._root_grad_bytes = self._grad_bytes() if self._grad_bytes else 0

    def forward_mode(self, frame: Frame, engine: Any) -> ForwardMode:
        """Open a record."""
        input_ids = [
            (
                id(slot.source if slot.source is not None else slot.stored),
                _slot_nbytes(slot),
                slot.key,
            )
            for slot in frame.inputs
            if isinstance(slot, InputSlot) and not slot.leaf
        ]
        record = self.open(frame.name, frame.module, input_ids)
        slots = [slot for slot in frame.inputs if isinstance(slot, InputSlot)]
        record.inputs_stand = all(slot.stored is None for slot in slots)
        self._mode = ObservedMode(frame, engine, record, self)
        return self._mode

    def cached(self, tensors: Iterable[Tensor]) -> None:
        """The region whose forward runs left these in a cache."""
        if self._mode is not None:
            self._mode.cached(tensors)

    def open(self, name: str, module: Module, input_ids: list[tuple[int, int, int]]) -> Record:
        """Return the record of a region whose forward begins; its inputs are (identity, bytes, storage key)."""
        before = next(reversed(self.records.values()), None)
        record = Record(name, module)
        record.input_ids = input_ids
        keys = {key for _, _, key in input_ids}
        for storage, position in before.outlived if before is not None else ():
            if (alive := storage()) is not None and alive._cdata in keys:
                record.input_op = position
        if self.outside is not None:
            record.input_outside = keys & self.outside.saved_keys()
        self.records[name] = record
        self._fold()
        record.end_level_bytes = self.meter.current_bytes()
        record.begin_bytes = self._held_bytes() - self._root_bytes
        record.forward = [self.meter.mark()]
        return record

    def forward_ended(self, frame: Frame, mode: Any) -> None:
        """Close the forward half."""
        self._mode = None
        self.close_forward(mode.record, mode.position, mode.cloned_bytes)
        # values before and after of what a region wrote outside itself: a plan may leave it untouched
        self.tracing_bytes += 2 * sum(nbytes_of(image.before) for image in frame.pre_images)

    def close_forward(self, record: Record, num_ops: int, cloned_bytes: int = 0) -> None:
        """A region's forward is over; `cloned_bytes` of its peak were the tracer's."""
        record.forward.append(self.meter.mark())
        record.num_ops = num_ops
        record.forward_peak_bytes = max(0, self._fold() - record.end_level_bytes - cloned_bytes)
        record.end_level_bytes = self.meter.current_bytes()
        record.end_bytes = self._held_bytes() - self._root_bytes
        self._last_ended = record
        if self.outside is not None:
            standing = self._standing_outside(self.outside.saved_bytes)
            known = sum(r.beside_nbytes for r in self.records.values())
            record.beside_nbytes = max(0, standing - known)
            self.outside_standing_bytes = standing

    def _standing_outside(self, saved_bytes: int) -> int:
        """Return what stands beside the regions of `saved_bytes` that autograd saved outside them.

        A region's own input is counted with the region. What several regions take (an encoder's
        output, a bias) is no region's own: all of them hold it, so it stands once.
        """
        users = self._users()
        own: dict[int, int] = {}
        shared: dict[int, int] = {}
        for record in self.records.values():
            for which, nbytes, key in record.input_ids:
                if users[which] > 1:
                    shared[which] = 0 if key in record.input_outside else nbytes
                elif key in record.input_outside:
                    own[key] = nbytes
        return max(0, saved_bytes - sum(own.values())) + sum(shared.values())

    def _users(self) -> dict[int, int]:
        """Return how many regions take each input, by its identity."""
        users: dict[int, int] = {}
        for record in self.records.values():
            for which, _, _ in record.input_ids:
                users[which] = users.get(which, 0) + 1
        return users

    def recompute_begins(self, frame: Any) -> None:
        """Close the backward of the region before, open this one's."""
        peak = self.close_backward()
        if self._last_ended is not None:
            self.outside_peak_bytes = max(0, peak - self._last_ended.end_level_bytes)
            self._last_ended = None
        record = self.records.get(frame.name)
        if record is None:
            return
        record.find_changed()
        record.backward_level_bytes = self.meter.current_bytes()
        record.entry_bytes = self._held_bytes() - self._root_bytes
        record.new_grad_bytes = (
            self._grad_bytes() - self._root_grad_bytes if self._grad_bytes else 0
        )
        record.backward = [self.meter.mark()]
        self._in_backward = record

    def inputs_landed(self) -> None:
        """Count the region's own peak from here: the plan decides where its input waits."""
        if self._in_backward is not None:
            self._in_backward.backward_level_bytes = self.meter.current_bytes()

    def recompute_ended(self, frame: Any) -> None:
        """Mark the end of the recomputation."""
        record = self._in_backward
        if record is not None and len(record.backward) == 1:
            record.backward.append(self.meter.mark())
            record.recompute_peak_bytes = max(0, self._fold() - record.backward_level_bytes)

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

    def written_buffers(self) -> dict[str, frozenset[int]]:
        """Buffers per region, by place among its modules' buffers, that it writes unseen."""
        return {
            r.name: frozenset(r.written_buffers) for r in self.records.values() if r.written_buffers
        }

    def region_traces(self) -> tuple[RegionTrace, ...]:
        """Return what was recorded, in forward order."""
        users = self._users()
        self._around = self.turning_bytes = 0
        traces = [self._trace_of(r, users) for r in self.records.values()]
        if self._grad_bytes is None:
            return tuple(traces)
        return tuple(self._with_levels(traces))

    def _with_levels(self, traces: list[RegionTrace]) -> Iterator[RegionTrace]:
        """Yield the traces with what their levels show and no other figure explains."""
        stood, every = 0, max(1, self._all_grad_bytes)
        share, to_come = max(0.0, 1.0 - self._root_grad_bytes / every), 0
        records = list(self.records.values())
        for k, (record, trace) in enumerate(zip(records, traces, strict=True)):
            stands = trace.input_nbytes if record.inputs_stand else 0
            before = stood + trace.beside_nbytes
            around = max(0, record.begin_bytes - before - trace.input_nbytes - self._around)
            self._around += around + trace.cast_nbytes
            stood = before + max(stands, trace.input_outside_nbytes)
            last = trace.ops[-1].nbytes if trace.ops else trace.input_nbytes
            grad = traces[k + 1].input_nbytes if k + 1 < len(traces) else last
            entry = 0 if record.entry_bytes is None else record.entry_bytes - stood - grad
            # a plan counts all gradients from the turning point on but those of regions to come
            to_come += trace.grad_nbytes
            entry -= max(0, int((every - to_come) * share) - record.new_grad_bytes)
            yield replace(trace, around_nbytes=around, entry_nbytes=max(0, entry))
            self.turning_bytes = max(0, record.end_bytes - stood - last - self._around)

    def _held_bytes(self) -> int:
        """Return what is alive beside the parameters' gradients."""
        return self.meter.current_bytes() - (self._grad_bytes() if self._grad_bytes else 0)

    def partial_traces(self) -> tuple[RegionTrace, ...]:
        """Return what is known of the regions whose forward ended, in an unfinished step.

        What a region's backward takes is at least what the plain step keeps for it, and no more is
        claimed before it ran.
        """
        traces = (t for t in self.region_traces() if len(self.records[t.name].forward) == 2)
        return tuple(
            replace(
                t,
                backward_peak_bytes=max(
                    t.backward_peak_bytes, sum(op.saved_nbytes for op in t.ops)
                ),
            )
            for t in traces
        )

    def where(self) -> str:
        """Return the words for the phase that the step is in."""
        if self._in_backward is not None:
            return f"the backward of {self._in_backward.name}"
        running = [r.name for r in self.records.values() if len(r.forward) == 1]
        return f"the forward of {running[-1]}" if running else "what runs outside regions"

    @property
    def in_backward(self) -> bool:
        """Whether a region's backward has begun and no later one's."""
        return self._in_backward is not None

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
        own = [(n, key) for which, n, key in record.input_ids if users[which] == 1]
        inputs = sum(n for n, _ in own)
        inputs_saved = sum(n for n, key in own if key in record.packed)
        saved = sum(op.saved_nbytes for op in record.ops) + record.hidden_nbytes + inputs_saved
        parameters = {id(p): nbytes_of(p) for p in record.module.parameters() if p.requires_grad}
        return RegionTrace(
            name=record.name,
            group=hashlib.sha1(repr(names).encode(), usedforsecurity=False).hexdigest()[:12],
            input_nbytes=inputs,
            saved_nbytes=saved,
            ops=ops,
            num_ops=record.num_ops,
            forward_s=max(0.0, seconds(record.forward[0], record.forward[-1]) - digesting),
            recompute_s=seconds(back[0], back[1]) if len(back) > 1 else 0.0,
            backward_s=seconds(back[1], back[2]) if len(back) > 2 else 0.0,
            forward_peak_bytes=record.forward_peak_bytes,
            input_saved_nbytes=inputs_saved,
            input_outside_nbytes=sum(n for n, key in own if key in record.input_outside),
            input_op=record.input_op,
            beside_nbytes=record.beside_nbytes,
            cast_nbytes=record.cast_nbytes,
            cached_nbytes=record.cached_nbytes,
            recompute_peak_bytes=record.recompute_peak_bytes,
            backward_peak_bytes=record.backward_peak_bytes,
            grad_nbytes=sum(parameters.values()),
            has_unseen_writer=bool(record.fragile),
        )


def _op_trace(op: Op, seconds: Any) -> OpTrace:
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
        rewritten=op.rewritten,
        freed_at=op.freed_at,
    )


def _slot_nbytes(slot: InputSlot) -> int:
    if slot.stored is not None:
        return slot.stored.nbytes
    return nbytes_of(slot.source) if slot.source is not None and is_plain(slot.source) else 0
