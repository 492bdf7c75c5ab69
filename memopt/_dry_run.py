"""The first step on fake tensors: what it takes in the safest placement, before any op runs.

A stand-in of the model (trace/stand_in.py) is called with fakes of the very arguments, its regions checkpointed as
the first plan has them, and backward goes through its loss. No memory is taken, no generator drawn from, and nothing
of the program is touched; where that cannot be shown beforehand, there is no dry run. The same observer as in the
traced step writes down levels and peaks, so the same planner judges them. They are lower bounds: kernels' scratch
memory, the loop's own loss and what else the loop holds by then are not in them.
"""

from __future__ import annotations

import functools
import logging
import random
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.checkpoint import checkpoint

from memopt.activations.caches import EmptyCaches
from memopt.activations.facts import facts_of
from memopt.activations.modes import MIN_MOVE_BYTES
from memopt.activations.observe import RegionObserver
from memopt.activations.observed_mode import Op, Record
from memopt.activations.patch import PatchedForward
from memopt.activations.regions import is_flat_sequential
from memopt.activations.tensors import nbytes_of, storage_key, tensors_in
from memopt.memory.fake_bytes import FakeBytes
from memopt.trace.purity import Impure, is_constant
from memopt.trace.stand_in import StandIns


def dry_run(
    model: Module,
    regions: Sequence[tuple[str, Module]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: torch.device,
) -> RegionObserver:
    """Return what an observer saw of a step of `model(*args, **kwargs)` on fake tensors.

    Raises:
        Impure: it cannot be shown that this would have no effect.
        Exception: whatever a program raises that is called with fake tensors.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    _check_surroundings(model, regions)
    state = _Generators()
    try:
        with (
            _disable_current_modes(),
            warnings.catch_warnings(),
            _unlogged("torch._subclasses.fake_tensor"),
            FakeTensorMode(),
            FakeBytes(device.type) as count,
            torch.autocast(
                device.type,
                torch.get_autocast_dtype(device.type),
                enabled=torch.is_autocast_enabled(device.type),
                cache_enabled=False,
            ),
        ):
            warnings.simplefilter("ignore")
            return _run(model, regions, args, kwargs, count)
    finally:
        if state.restore():
            raise Impure("random numbers were drawn outside of tensors")


@contextmanager
def _unlogged(name: str) -> Iterator[None]:
    """PyTorch logs the traceback of an op that has no fake for its arguments: nothing that a user can mend."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _check_surroundings(model: Module, regions: Sequence[tuple[str, Module]]) -> None:
    if not model.training:
        raise Impure("the model is not in training mode: this may be no step")
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        raise Impure("hooks on saved tensors")
    if any(is_flat_sequential(module) for _, module in regions):
        raise Impure("a Sequential that is cut into runs")
    if not regions:
        raise Impure("no region")


class _Generators:
    """States of the generators that code can draw from without a tensor op, and of the CPU's."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._python = random.getstate()
        self._numpy = np.random.get_state(legacy=False)  # noqa: NPY002 - the program's global one

    def restore(self) -> bool:
        """Put them back; return whether anything had been drawn."""
        numpy_now = np.random.get_state(legacy=False)  # noqa: NPY002 - as above
        same = random.getstate() == self._python and str(numpy_now) == str(self._numpy)
        same = same and torch.equal(torch.get_rng_state(), self._torch)
        if not same:
            torch.set_rng_state(self._torch)
            random.setstate(self._python)
            np.random.set_state(self._numpy)  # noqa: NPY002 - as above
        return not same


class _Meter:
    """Bytes of fakes; there is no time."""

    def __init__(self, count: FakeBytes) -> None:
        self._count = count

    def current_bytes(self) -> int:
        return self._count.current_bytes

    def peak(self) -> int:
        return self._count.peak_bytes

    def take_peak(self) -> int:
        peak = self._count.peak_bytes
        self._count.reset_peak()
        return peak

    def mark(self) -> float:
        return 0.0

    def seconds(self, begin: float, end: float) -> float:
        return 0.0


def _run(
    model: Module,
    regions: Sequence[tuple[str, Module]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    count: FakeBytes,
) -> RegionObserver:
    stand_ins = StandIns(_is_ours)
    shadow = stand_ins.model(model)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    args, kwargs = pytree.tree_unflatten([stand_ins.value(leaf) for leaf in leaves], spec)
    observer = RegionObserver(_Meter(count))
    calls = _Calls(observer)
    for name, module in regions:
        found = stand_ins.of(module)
        assert found is not None
        found.__dict__["forward"] = functools.partial(calls.region, name, module, found.forward)
    fixed = {storage_key(t) for t in (*shadow.parameters(), *shadow.buffers())}
    outside = observer.outside = _Outside(fixed)
    observer.begin_root()
    with torch.autograd.graph.saved_tensors_hooks(outside.pack, lambda t: t):
        out = shadow(*args, **kwargs)
    loss = _loss_of(out)
    del out, args, kwargs
    # the loop's own loss is not known: its gradient, about as large as what is held here, takes nothing
    torch.autograd.backward(
        loss, torch.empty((), dtype=loss.dtype, device=loss.device).expand_as(loss)
    )
    observer.close_backward()
    calls.finish()
    return observer


def _is_ours(value: Any) -> bool:
    if not isinstance(value, PatchedForward):
        return False
    if not value.replaces_nothing:
        raise Impure("a forward of an object's own")
    return True


def _loss_of(out: Any) -> Tensor:
    """Return what backward surely starts from.

    Raises:
        Impure: there are several candidates.
    """
    loss = out if isinstance(out, Tensor) else getattr(out, "loss", None)
    if loss is None and isinstance(out, dict):
        loss = out.get("loss")
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise Impure("what the loop will call backward on is not known")
    return loss


class _Outside:
    """Bytes that autograd saves outside regions, as the session's own hooks count them."""

    def __init__(self, fixed: set[int]) -> None:
        self._fixed = fixed
        self._seen: dict[int, weakref.ref[Any]] = {}
        self.saved_bytes = 0

    def saved_keys(self) -> set[int]:
        """Return the keys of the storages that were saved and are alive."""
        return {key for key, known in self._seen.items() if known() is not None}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        known = self._seen.get(storage._cdata)
        if storage._cdata in self._fixed or nbytes_of(tensor) < MIN_MOVE_BYTES:
            return tensor
        if known is None or known() is not storage:
            self._seen[storage._cdata] = weakref.ref(storage)
            self.saved_bytes += storage.nbytes()
        return tensor


@dataclass(frozen=True)
class _Call:
    """One region call, as the observer knows frames: by its name."""

    name: str


class _Calls:
    """Runs region calls under checkpoint and tells the observer.

    Blocks of a model are alike: one of each kind runs, the others repeat what it showed.
    """

    def __init__(self, observer: RegionObserver) -> None:
        self._observer = observer
        self._num_calls: dict[str, int] = {}
        self._kinds: dict[Any, tuple[Record, Any]] = {}
        self._repeats: list[tuple[Record, Record]] = []

    def region(
        self, name: str, module: Module, plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run one call, checkpointed, or repeat one."""
        caches = EmptyCaches(module, args, kwargs)
        if caches.filled:
            raise Impure("a filled key/value cache")
        args, kwargs, had_cache = caches.taken_out(args, kwargs)
        run = caches.given_to(plain)
        count = self._num_calls.get(name, 0)
        self._num_calls[name] = count + 1
        call = _Call(f"{name}#{count}" if count else name)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        inputs = [t for t in leaves if isinstance(t, Tensor)]
        trained = [p for p in plain.__self__.parameters() if p.requires_grad]  # type: ignore[attr-defined]
        if not trained and not any(t.requires_grad for t in inputs):
            return run(*args, **kwargs)
        record = self._observer.open(
            call.name,
            module,
            [(id(t), nbytes_of(t), storage_key(t)) for t in inputs if not t.is_leaf],
        )
        kind = (_kind_of(module), str(spec), tuple(map(_signature, leaves)), had_cache)
        known = self._kinds.get(kind)
        if known is not None:
            self._repeats.append((record, known[0]))
            self._observer.close_forward(record, known[0].num_ops)
            return _repeated(known[1], [*inputs, *trained[:1]], self._observer, call)
        out = checkpoint(
            lambda: run(*args, **kwargs),
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (
                _Forward(self._observer, record),
                _Recompute(self._observer, call),
            ),
        )
        outputs, out_spec = pytree.tree_flatten(out)
        if all(isinstance(t, Tensor) or is_constant(t) for t in outputs):
            templates = [_Template.of(t) if isinstance(t, Tensor) else t for t in outputs]
            self._kinds[kind] = record, (templates, out_spec)
        return out

    def finish(self) -> None:
        """Write down what the repeated calls would have shown."""
        for record, original in self._repeats:
            record.ops, record.hidden_nbytes = original.ops, original.hidden_nbytes
            pairs = zip(record.input_ids, original.input_ids, strict=True)
            record.packed = {own[2] for own, first in pairs if first[2] in original.packed}
            record.forward_peak_bytes = original.forward_peak_bytes
            record.recompute_peak_bytes = original.recompute_peak_bytes
            record.backward_peak_bytes = original.backward_peak_bytes


def _kind_of(module: Module) -> Any:
    """Return what two blocks must share to take the same bytes: classes, sizes and settings, not their place."""
    parts = []
    for name, part in module.named_modules():
        sizes = [(n, _signature(p)) for n, p in part.named_parameters(recurse=False)]
        settings = [
            (k, repr(v))
            for k, v in vars(part).items()
            if is_constant(v) and k not in ("layer_idx", "layer_id", "layer_index")
        ]
        parts.append((name, type(part), tuple(sizes), tuple(settings)))
    return tuple(parts)


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.requires_grad
    return repr(value) if is_constant(value) else id(value)


@dataclass(frozen=True)
class _Template:
    """An output of a region, for those that repeat it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> _Template:
        """Return a tensor's."""
        return cls(
            tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad
        )

    def make(self) -> Tensor:
        """Return a tensor like it."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


def _repeated(
    template: tuple[list[Any], Any], inputs: list[Tensor], observer: RegionObserver, call: _Call
) -> Any:
    """Return outputs like those of the region that ran, with a backward that makes the inputs' gradients."""
    templates, spec = template
    made = [t.make() if isinstance(t, _Template) else t for t in templates]
    places = [i for i, t in enumerate(templates) if isinstance(t, _Template) and t.requires_grad]
    linked = _Link.apply(observer, call, len(places), *(made[i] for i in places), *inputs)
    for place, tensor in zip(places, linked, strict=True):
        made[place] = tensor
    return pytree.tree_unflatten(made, spec)


class _Link(torch.autograd.Function):
    """Gives outputs that were made elsewhere a place in the graph."""

    @staticmethod
    def forward(
        ctx: Any, observer: RegionObserver, call: _Call, num_outputs: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the first `num_outputs` tensors, as functions of the others."""
        ctx.observer, ctx.call, ctx.num_outputs = observer, call, num_outputs
        ctx.wanted = [
            _Template.of(t) if t.requires_grad and not isinstance(t, torch.nn.Parameter) else None
            for t in tensors[num_outputs:]
        ]
        return tuple(t.view_as(t) for t in tensors[:num_outputs])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        """Return gradients of the inputs."""
        ctx.observer.recompute_begins(ctx.call)
        ctx.observer.recompute_ended(ctx.call)
        made = [t.make() if t is not None else None for t in ctx.wanted]
        return (None, None, None, *([None] * ctx.num_outputs), *made)


class _Forward(TorchDispatchMode):
    """Around a region's forward: which storages are born, and which of them autograd keeps."""

    def __init__(self, observer: RegionObserver, record: Record) -> None:
        super().__init__()
        self._observer = observer
        self._record = record
        self._births: dict[int, tuple[weakref.ref[Any], Op, int]] = {}
        self._num_ops = 0
        self._hooks: Any = None

    def __enter__(self) -> _Forward:
        super().__enter__()
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        assert top is not None, "the checkpoint's own hooks"

        def pack(tensor: Tensor) -> Any:
            self._packed(tensor)
            return top[0](tensor)

        self._hooks = torch.autograd.graph.saved_tensors_hooks(pack, top[1])
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.__exit__(*exc)
        super().__exit__(*exc)
        self._births.clear()
        self._observer.close_forward(self._record, self._num_ops)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        sources = {storage_key(t) for t in tensors_in((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        op = Op(self._num_ops, facts_of(func), reason="a dry run places nothing")
        self._num_ops += 1
        for tensor in tensors_in(out):
            key = storage_key(tensor)
            if key not in sources:
                nbytes = tensor.untyped_storage().nbytes()
                op.nbytes += nbytes
                self._births[key] = (weakref.ref(tensor.untyped_storage()), op, nbytes)
        self._record.ops.append(op)
        return out

    def _packed(self, tensor: Tensor) -> None:
        birth = self._births.get(storage_key(tensor))
        if birth is None or birth[0]() is not tensor.untyped_storage():
            self._record.packed.add(storage_key(tensor))
        else:
            _, op, nbytes = birth
            if storage_key(tensor) not in op.saved:
                op.saved.add(storage_key(tensor))
                op.saved_nbytes += nbytes


class _Recompute(SimpleNamespace):
    """Around a region's recomputation."""

    def __init__(self, observer: RegionObserver, call: _Call) -> None:
        super().__init__(observer=observer, call=call)

    def __enter__(self) -> None:
        self.observer.recompute_begins(self.call)

    def __exit__(self, *exc: object) -> None:
        self.observer.recompute_ended(self.call)
