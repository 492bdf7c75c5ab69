"""The two dispatch modes: one places what ops return, the other answers ops from storage.

`ForwardMode` sees every ATen op of a region's forward, below autograd, and keeps, copies out or
drops its outputs as the plan says. `RecomputeMode` sees the same ops again in backward, matched by
position with the overload checked, and answers those that were stored; the rest run.

What makes this exact, each rule learnt from a silently wrong gradient:
- copy on write: before an op writes to a storage that holds a stored output, the stored value is
  made safe (`Stored.protect`);
- writes to storages from outside the region leave a pre-image, from which recomputation starts;
- ops that draw random numbers run again; where an attention with dropout is answered, the
  generators are set to where it left them;
- `detach`, and autocast's casts of leaves (which its cache may answer), are not numbered;
- ops of another graph task (a nested `autograd.grad`) are not the region's.
The cost is paid per op, so every question about an op is answered once per overload (facts.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memopt.activations.facts import _FACTS, OpFacts, draws_numbers, facts_of
from memopt.activations.frame import Answer, Frame, InputSlot, PreImage, RngState, hollow_answer
from memopt.activations.hollow import HollowWatch
from memopt.activations.stored import Checked, DeviceStored, Label, Stored
from memopt.activations.tensors import is_dense, is_plain, nbytes_of, storage_key, tensors_in
from memopt.types.errors import RecomputeMismatchError
from memopt.types.plan import Placement

_graph_task = torch._C._current_graph_task_id

MIN_MOVE_BYTES = 1 << 16
"""Tensors smaller than this stay on the device: a transfer costs more than they weigh."""

Place = Placement | Literal["hollow"]
StoreFn = Callable[..., Stored | None]


class _RegionMode(TorchDispatchMode):
    """What both modes share: they survive compiled and higher-order code."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled code run under the mode."""
        return True


class ForwardMode(_RegionMode):
    """Places op outputs of one region call.

    Args:
        frame: the call.
        placements: position -> (op name, placement, or "hollow" where nothing needs the output).
        fragile: positions whose outputs an unseen kernel writes later: copied at birth.
        store: `store(tensor, placement, label, clone_first=...)` of the engine.
        device: the session's device.
        attention: where attention goes when positions mean nothing (changing op lists).
        strict: compare kept outputs, too, with what they were.
    """

    def __init__(
        self,
        frame: Frame,
        placements: Mapping[int, tuple[str, Place]],
        fragile: frozenset[int],
        store: StoreFn,
        device: torch.device,
        *,
        attention: Placement | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__()
        self.frame = frame
        self._attention = attention
        self._strict = strict
        self.born: set[int] = set()
        self.position = 0
        self._placements = placements
        self._fragile = fragile
        self._store = store
        self._device = device
        self._held: dict[int, list[Stored]] = {}
        for slot in frame.inputs:
            if isinstance(slot, InputSlot) and slot.stored is not None:
                self._held.setdefault(slot.key, []).append(slot.stored)
        self._task = _graph_task()
        self._ops = frame.ops
        self._witness = frame.witness
        self._watch = HollowWatch(frame) if frame.skips is not None else None

    def __enter__(self) -> ForwardMode:
        """Push the mode."""
        super().__enter__()
        if self._watch is not None:
            self._watch.begin()
        return self

    def __exit__(self, *exc: object) -> None:
        """Pop it."""
        if self._watch is not None:
            self._watch.end()
        super().__exit__(*exc)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Number the op, protect what it writes to, run it, place what it returns."""
        facts = _FACTS.get(func) or facts_of(func)
        if (
            facts.unnumbered
            or (facts.casts and _is_cached_cast(args))
            or _graph_task() != self._task
        ):
            return func(*args, **(kwargs or {}))
        position = self.position
        self.position = position + 1
        self._ops.append(func)
        if self._witness is not None:
            self._witness.see(args, kwargs, self.born)
        if facts.writes:
            self.before_write(facts, args, kwargs)
        if kwargs and kwargs.get("generator") is not None:
            generator = kwargs["generator"]
            self.frame.generators.setdefault(generator, generator.get_state())
        out = func(*args, **(kwargs or {}))
        place = self._placements.get(position)
        if self._attention is not None and facts.kind == "attention":
            place = (facts.name, self._attention)
        if place is not None:
            self._place(position, place, func, facts, args, kwargs or {}, out)
        if self._watch is not None and position not in self.frame.answers:
            self._watch.read((args, kwargs), out, writes=facts.writes)
        if type(out) is Tensor:
            self.born.add(out.untyped_storage()._cdata)
        elif type(out) in (tuple, list):
            self.born.update(storage_key(t) for t in out if is_plain(t))
        return out

    def before_write(self, facts: OpFacts, args: tuple[Any, ...], kwargs: Any) -> None:
        """Make stored values safe, and remember outside ones, before the op writes."""
        written = [args[i] for i in facts.written_args if i < len(args)]
        written += [kwargs[k] for k in facts.written_kwargs if kwargs and k in kwargs]
        for tensor in tensors_in(written):
            if not is_plain(tensor):
                continue
            key = storage_key(tensor)
            for stored in self._held.pop(key, ()):
                stored.protect()
            if key not in self.born and not self._has_pre_image(tensor):
                self.frame.pre_images.append(PreImage(tensor))

    def _has_pre_image(self, tensor: Tensor) -> bool:
        return any(
            image.target.data_ptr() == tensor.data_ptr()
            and image.target.shape == tensor.shape
            and image.target.stride() == tensor.stride()
            and image.target.dtype == tensor.dtype
            for image in self.frame.pre_images
        )

    def _place(
        self,
        position: int,
        place: tuple[str, Place],
        func: Any,
        facts: OpFacts,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
    ) -> None:
        """Store the op's outputs; anything in the way means that it is run again."""
        name, placement = place
        if name != facts.name or facts.kind in ("factory", "random"):
            return
        sequence = type(out) if isinstance(out, (tuple, list)) else None
        outputs = list(out) if sequence is not None else [out]
        if not self._can_store(outputs, args, kwargs):
            return
        if placement == "hollow":
            self._leave_hollow(position, func, outputs, sequence)
            return
        label = Label(region=self.frame.name, what=f"output of {facts.name} (op {position})")
        parts: list[Any] = []
        for output in outputs:
            part = output
            if isinstance(output, Tensor):
                part = self._store_one(output, placement, label, position in self._fragile)
                if part is None:
                    return
            parts.append(part)
        answer = Answer(func, parts, sequence)
        if facts.kind == "attention" and draws_numbers(facts, func, args, kwargs):
            answer.rng_after = RngState.capture(self._device)
        self.frame.answers[position] = answer
        for output, part in zip(outputs, parts, strict=True):
            if isinstance(output, Tensor):
                self._held.setdefault(storage_key(output), []).append(part)

    def _leave_hollow(
        self, position: int, func: Any, outputs: list[Any], sequence: type | None
    ) -> None:
        answer = hollow_answer(func, outputs, sequence)
        if answer is not None:
            self.frame.answers[position] = answer
            assert self._watch is not None
            for output in outputs:
                self._watch.born(output)

    def _store_one(
        self, output: Tensor, placement: Placement, label: Label, fragile: bool
    ) -> Stored | None:
        stays = placement == "device" or nbytes_of(output) < MIN_MOVE_BYTES
        if stays or output.device != self._device:  # attention's seeds are CPU tensors
            kept = DeviceStored(output, label, clone_first=fragile)
            return Checked(kept, output, label) if self._strict else kept
        return self._store(output, placement, label, clone_first=fragile, wait=False)

    def _can_store(self, outputs: list[Any], args: tuple[Any, ...], kwargs: Any) -> bool:
        """Whether every output is a dense tensor of its own storage, or no tensor at all."""
        for output in outputs:
            if not isinstance(output, Tensor):
                continue
            if not is_plain(output) or not is_dense(output):
                return False
            if output.numel() and _has_storage((args, kwargs), storage_key(output)):
                return False
        return True


def _has_storage(value: Any, key: int) -> bool:
    """Whether a tensor among an op's arguments has this storage."""
    if isinstance(value, Tensor):
        return is_plain(value) and storage_key(value) == key
    if isinstance(value, (tuple, list)):
        return any(_has_storage(item, key) for item in value)
    if isinstance(value, dict):
        return any(_has_storage(item, key) for item in value.values())
    return False


class RecomputeMode(_RegionMode):
    """Answers the ops of one recomputation from what the frame stored."""

    def __init__(self, frame: Frame, *, keep: bool, skip: bool = False) -> None:
        super().__init__()
        self.position = 0
        self._skip = skip
        self._frame = frame
        self._ops = frame.ops
        self._answers = frame.answers
        self._keep = keep
        self._task = _graph_task()
        self._witness = frame.witness

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Answer the op or run it."""
        facts = _FACTS.get(func) or facts_of(func)
        if (
            facts.unnumbered
            or (facts.casts and _is_cached_cast(args))
            or _graph_task() != self._task
        ):
            return func(*args, **(kwargs or {}))
        position = self.position
        self.position = position + 1
        if position >= len(self._ops) or self._ops[position] is not func:
            self._raise_mismatch(position, facts)
        if self._witness is not None:
            self._check_arguments(position, facts, args, kwargs)
        answer = self._answers.get(position)
        if answer is None or (answer.hollow and not self._skip):
            return func(*args, **(kwargs or {}))
        out = answer.take(keep=self._keep)
        if not self._keep:
            del self._answers[position]
        return out

    def _check_arguments(
        self, position: int, facts: OpFacts, args: tuple[Any, ...], kwargs: Any
    ) -> None:
        assert self._witness is not None
        own = {storage_key(image.target) for image in self._frame.pre_images}
        change = self._witness.change(position, args, kwargs, own)
        if change:
            raise RecomputeMismatchError(
                f"region {self._frame.name!r}: op {position} ({facts.name}) of the recomputation "
                f"{change}; the region reads something outside its modules that changed between "
                "forward and backward (a global, an attribute of a shared object); pass it as an "
                "argument, keep it in an attribute of the module, or leave the region out with "
                "regions="
            )

    def _raise_mismatch(self, position: int, facts: OpFacts) -> None:
        expected = str(self._ops[position]) if position < len(self._ops) else "the end"
        raise RecomputeMismatchError(
            f"region {self._frame.name!r}: op {position} of the recomputation is {facts.name}, "
            f"but the forward had {expected} there; a region must run the same ops again "
            "(no data-dependent branches on state that changed); exclude it with regions=, or "
            "make its forward repeatable"
        )


def _is_cached_cast(args: tuple[Any, ...]) -> bool:
    """Whether `_to_copy` casts a leaf that requires grad: autocast may answer it from a cache."""
    tensor = args[0]
    return bool(tensor.requires_grad and tensor.is_leaf)
