"""Frame: everything one region call must remember until its backward.

The checkpoint's closures own the frame; the engine only holds weak references. So a frame, and
every byte that waits in it, lives exactly as long as the autograd graph that needs it: dropped
graphs, exceptions and leaving the context early need no clean-up code.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn import Module
from torch.utils._python_dispatch import _disable_current_modes

from memopt.activations.put_back import ABSENT, Node, Putter, Undo
from memopt.activations.stored import Hollow, Stored
from memopt.activations.surroundings import Surroundings
from memopt.activations.tensors import (
    digest,
    graph_input,
    is_dense,
    is_plain,
    storage_key,
    version_of,
)
from memopt.activations.witness import Witness
from memopt.types.errors import RecomputeMismatchError

if TYPE_CHECKING:
    from memopt.activations.skips import RegionSkips


class Answer:
    """The stored result of one op: `func` for the match, one part per output."""

    __slots__ = ("func", "hollow", "parts", "rng_after", "sequence")

    def __init__(
        self, func: Any, parts: list[Any], sequence: type | None, *, hollow: bool = False
    ) -> None:
        self.func = func
        self.parts = parts
        self.sequence = sequence
        self.hollow = hollow
        self.rng_after: RngState | None = None

    def stored(self) -> list[Stored]:
        """The parts that hold tensors."""
        return [part for part in self.parts if hasattr(part, "take")]

    def take(self, *, keep: bool) -> Any:
        """Return the op's result."""
        if self.rng_after is not None:
            self.rng_after.restore()
        values = [p.take(keep=keep) if hasattr(p, "take") else p for p in self.parts]
        return values[0] if self.sequence is None else self.sequence(values)


def hollow_answer(func: Any, outputs: list[Any], sequence: type | None) -> Answer | None:
    """Return what answers an op without its values; None unless all outputs are of floating point."""
    if not all(isinstance(out, Tensor) and out.is_floating_point() for out in outputs):
        return None
    return Answer(func, [Hollow(out) for out in outputs], sequence, hollow=True)


@dataclass(slots=True)
class RngState:
    """States of every random generator that a region may draw from without naming it."""

    cpu: Tensor
    device: torch.device | None
    cuda: Tensor | None
    python: tuple[Any, ...]
    numpy: Any

    @classmethod
    def capture(cls, device: torch.device) -> RngState:
        """Read the CPU generator's state and, on CUDA, the device's."""
        on_cuda = device.type == "cuda"
        return cls(
            cpu=torch.get_rng_state(),
            device=device if on_cuda else None,
            cuda=torch.cuda.get_rng_state(device) if on_cuda else None,
            python=random.getstate(),
            numpy=np.random.get_state(legacy=False),  # noqa: NPY002 - the program's global one
        )

    def restore(self) -> None:
        """Set the generators back."""
        torch.set_rng_state(self.cpu)
        if self.device is not None and self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002 - the program's global one


class PreImage:
    """A tensor outside the region that its forward wrote, with its value before."""

    __slots__ = ("before", "later", "target")

    def __init__(self, target: Tensor) -> None:
        self.target = target.detach()
        self.before = self.target.clone()
        self.later: Tensor | None = None


def swap_in(images: list[PreImage]) -> None:
    """Put the values before the forward in place, last capture first."""
    for image in images:
        image.later = image.target.clone()
    for image in reversed(images):
        _write(image.target, image.before)


def swap_out(images: list[PreImage]) -> None:
    """Put back the values that the program left."""
    for image in images:
        if image.later is not None:
            _write(image.target, image.later)
            image.later = None


def _write(target: Tensor, value: Tensor) -> None:
    """Copy without a version bump: the program must not see that the value was ever gone."""
    if target.is_inference():
        with torch.inference_mode():
            target.copy_(value)
        return
    with _unsafe_preserve_version_counter(target), torch.no_grad():
        target.copy_(value)


class InputSlot:
    """One tensor argument of a region: kept as the program's own, or stored."""

    __slots__ = ("key", "leaf", "requires_grad", "source", "stored", "version")

    def __init__(self, tensor: Tensor, stored: Stored | None) -> None:
        self.requires_grad = tensor.requires_grad
        self.leaf = tensor.is_leaf
        self.source = tensor if stored is None else None
        self.stored = stored
        self.version = version_of(tensor)
        self.key = storage_key(tensor) if is_plain(tensor) else -1

    def land(self, region: str) -> Tensor:
        """Return the tensor for recomputation, with the same place in a graph.

        A leaf stays the leaf itself. Others get a fresh tensor that requires grad and is no
        leaf either: autocast caches casts of leaves, and the op sequence must not change.
        """
        if self.stored is not None:
            tensor = self.stored.take(keep=True)
        else:
            assert self.source is not None
            if version_of(self.source) != self.version:
                raise RecomputeMismatchError(
                    f"an input of region {region!r} was modified in place between forward and "
                    f"backward (version {version_of(self.source)}, {self.version} at forward); "
                    "write to a copy instead (tensor.clone())"
                )
            tensor = self.source
            if self.leaf:
                return tensor
            tensor = tensor.detach()
        if not self.requires_grad:
            return tensor
        return graph_input(tensor)


class Weight:
    """A parameter that a region's forward began with."""

    __slots__ = ("address", "name", "owner", "tensor", "value", "version")

    def __init__(self, owner: Module, name: str, tensor: Tensor) -> None:
        self.value: Tensor | None = None
        """A digest, where the forward is witnessed: `.data` and numpy write without a new version."""
        self.owner = owner
        self.name = name
        self.tensor = tensor
        self.version = version_of(tensor)
        self.address = tensor.data_ptr() if is_plain(tensor) else 0

    def note_value(self) -> None:
        """Take a digest, where there are bytes to take it of; it is no tensor of the step's."""
        if self.address and is_dense(self.tensor) and not hasattr(self.tensor, "ds_id"):
            with _disable_current_modes():
                self.value = digest(self.tensor)

    @property
    def is_changed(self) -> bool:
        """Whether it was written since its version, or its digest, was noted."""
        if version_of(self.tensor) != self.version:
            return True
        with _disable_current_modes():
            return self.value is not None and not torch.equal(digest(self.tensor), self.value)

    @property
    def is_replaced(self) -> bool:
        """Whether its `data` is other memory now; DeepSpeed's ZeRO-3 gathers weights that way, and says so."""
        if not self.address or hasattr(self.tensor, "ds_id"):
            return False
        return self.tensor.data_ptr() not in (self.address, 0)


def _weights_of(modules: list[Module]) -> list[Weight]:
    return [
        Weight(owner, name, parameter)
        for owner in modules
        for name, parameter in owner._parameters.items()
        if parameter is not None
    ]


def _buffers_of(modules: list[Module]) -> list[tuple[Module, str, Tensor]]:
    return [
        (owner, name, buffer)
        for owner in modules
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]


_MISSING = object()


def _set_weight(parameters: dict[str, Any], name: str, value: Any) -> None:
    if value is _MISSING:
        parameters.pop(name, None)
    else:
        parameters[name] = value


class Frame:
    """One region call between its forward and its backward."""

    __slots__ = (
        "__weakref__", "answers", "buffer_versions", "buffers", "call", "call_args", "completed",
        "generators", "inputs", "landed", "module", "name", "ops", "pre_images", "previous",
        "raised", "replaced", "rng", "skips", "surroundings", "unseen", "weights",
        "witness",
    )  # fmt: skip

    def __init__(self, name: str, module: torch.nn.Module, rng: RngState) -> None:
        self.name = name
        self.module = module
        self.rng = rng
        self.ops: list[Any] = []
        self.answers: dict[int, Answer] = {}
        self.inputs: list[InputSlot | Any] = []
        self.landed: list[list[Any]] = []
        self.call_args: list[Any] | None = None
        self.pre_images: list[PreImage] = []
        modules = list(module.modules())
        self.weights = _weights_of(modules)
        self.replaced: Weight | None = None
        self.unseen: Weight | None = None
        """A weight that the forward wrote and no op showed."""
        self.buffers = _buffers_of(modules)
        self.buffer_versions: list[int] = []
        self.generators: dict[torch.Generator, Tensor] = {}
        self.completed = self.raised = False
        self.previous: Any = None
        self.call: Callable[[list[Any]], Any] | None = None
        self.skips: RegionSkips | None = None
        self.surroundings = Surroundings(modules, (w.tensor for w in self.weights))
        self.witness: Witness | None = None

    def complete(self) -> None:
        """The forward returned: from now on a change of what it read is a change too late."""
        self.completed = True
        self.buffer_versions = [version_of(b) for _, _, b in self.buffers]
        self.replaced = next((w for w in self.weights if w.is_replaced), None)
        if not self.pre_images:
            return
        written = {storage_key(image.target) for image in self.pre_images}
        for slot in self.inputs:
            if isinstance(slot, InputSlot) and slot.key in written and slot.source is not None:
                slot.version = version_of(slot.source)
        for weight in self.weights:
            if is_plain(weight.tensor) and storage_key(weight.tensor) in written:
                weight.version = version_of(weight.tensor)

    def writes_input(self) -> bool:
        """Whether the region's forward wrote to one of its arguments."""
        if not self.pre_images:
            return False
        written = {storage_key(image.target) for image in self.pre_images}
        return any(isinstance(s, InputSlot) and s.key in written for s in self.inputs)

    def check_buffers(self) -> None:
        """Raise where a buffer that the forward only read was written since.

        One that the forward wrote itself starts from its pre-image, whoever wrote it after.
        """
        if not self.completed:
            return
        own = {storage_key(image.target) for image in self.pre_images}
        for (_, name, buffer), version in zip(self.buffers, self.buffer_versions, strict=True):
            if version_of(buffer) != version and buffer.untyped_storage()._cdata not in own:
                raise RecomputeMismatchError(
                    f"buffer {name!r} of region {self.name!r} was modified in place between "
                    "forward and backward, so the recomputation would read other values; assign "
                    "a new tensor instead of writing into it, or call backward first"
                )

    def keep_buffers(self, indices: frozenset[int]) -> None:
        """Keep what these buffers are now: the forward will write to them unseen."""
        for index in indices:
            if index < len(self.buffers):
                self.pre_images.append(PreImage(self.buffers[index][2]))

    def swap_buffers(self) -> list[tuple[Module, str, Any]]:
        """Put the buffers that the forward began with in place; return what stood there."""
        later = [(m, n, m._buffers.get(n)) for m, n, _ in self.buffers]
        for module, name, buffer in self.buffers:
            module._buffers[name] = buffer
        return later

    def check_weights(self) -> None:
        """Raise where the recomputation cannot start from the weights that the forward began with."""
        if self.replaced is not None:
            raise RecomputeMismatchError(
                f"the forward of region {self.name!r} gave {self._name(self.replaced)} other memory "
                "(`.data = ...`), so the recomputation would start from other values; write into "
                "it instead (with torch.no_grad(): weight.copy_(...))"
            )
        if self.unseen is not None:
            raise RecomputeMismatchError(
                f"the forward of region {self.name!r} wrote to {self._name(self.unseen)} in a way that "
                "PyTorch does not see (numpy, a Triton kernel), so the recomputation would start from "
                "other values; write with PyTorch (with torch.no_grad(): weight.mul_(...)), or leave the "
                "region out with regions="
            )
        for weight in self.weights:
            if weight.is_changed:
                raise RecomputeMismatchError(
                    f"{self._name(weight)} of region {self.name!r} was modified in place between forward "
                    "and backward, so the recomputation would use other weights; call backward "
                    "before optimizer.step(), or assign a new parameter instead of writing into it"
                )

    def _name(self, weight: Weight) -> str:
        names = (n for n, m in self.module.named_modules() if m is weight.owner)
        return f"{next(names, '')}.{weight.name}".lstrip(".")

    def swap_weights(self, undo: Undo) -> None:
        """Put the weights that the forward began with in place: functional_call had others there."""
        for weight in self.weights:
            parameters = weight.owner._parameters
            now = parameters.get(weight.name, _MISSING)
            if now is not weight.tensor:
                undo.append(partial(_set_weight, parameters, weight.name, now))
                _set_weight(parameters, weight.name, weight.tensor)

    def land(self) -> None:
        """Bring the arguments back, but for the objects among them."""
        self.landed.append(
            [s.land(self.name) if isinstance(s, InputSlot) else s for s in self.inputs]
        )

    def swap_surroundings(self, undo: Undo) -> None:
        """Put the Python state that the forward began with in place, the arguments' too."""
        putter: Putter = self.surroundings.swap_in(undo)
        values = self.landed[-1]
        for index, slot in enumerate(self.inputs):
            if isinstance(slot, Node):
                values[index] = putter.put(slot, ABSENT)

    def watch(self) -> None:
        """Have the ops of this call witnessed (witness.py)."""
        known = {slot.key for slot in self.inputs if isinstance(slot, InputSlot)}
        states = (*(w.tensor for w in self.weights), *(b for _, _, b in self.buffers))
        known.update(storage_key(t) for t in states if is_plain(t))
        self.witness = Witness(known)
        for weight in self.weights:
            weight.note_value()

    def watch_weights(self) -> None:
        """The witnessed forward is over: find weights that it wrote unseen, and take the others down as they are."""
        if self.witness is None:
            return
        written = {storage_key(image.target) for image in self.pre_images}
        for weight in self.weights:
            if weight.value is None or weight.is_replaced:
                continue
            before = weight.value
            weight.note_value()
            seen = storage_key(weight.tensor) in written
            if not (seen or torch.equal(before, weight.value)):
                self.unseen = weight

    def waiting(self) -> list[Stored]:
        """Everything stored, in the order in which recomputation asks for it."""
        inputs = [s.stored for s in self.inputs if isinstance(s, InputSlot) and s.stored]
        answers = [part for _, a in sorted(self.answers.items()) for part in a.stored()]
        return inputs + answers
