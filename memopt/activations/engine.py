"""The activation engine: turns region calls into checkpointed frames and runs a plan over them.

It owns no tensor: frames do (frame.py), and the graph owns the frames. What it holds is the plan
in force, the transfers, and weak references to live frames in the order of their forwards, from
which it knows what backward will ask for next.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from memopt.activations.caches import EmptyCaches
from memopt.activations.clock import RegionClock
from memopt.activations.contexts import ForwardContext, RecomputeContext
from memopt.activations.frame import Frame, InputSlot, PreImage, RngState
from memopt.activations.modes import MIN_MOVE_BYTES, ForwardMode, Place
from memopt.activations.patch import PatchedForward
from memopt.activations.regions import is_flat_sequential
from memopt.activations.runs import RunsPatch
from memopt.activations.shared_inputs import SharedInputs
from memopt.activations.skips import Readers, RegionSkips
from memopt.activations.stored import Checked, Label, Stored
from memopt.activations.tensors import is_dense, is_plain, nbytes_of
from memopt.activations.transfers import Transfers
from memopt.types.plan import Placement, Plan, Prediction, RegionPlan

_RECOMPUTED = RegionPlan(name="")
_CHANGING = (
    "the op list of some regions changes from call to call: they are placed by their input and "
    "attention only"
)
_CHECKPOINTED = (
    "regions called inside a checkpoint of the program's own (torch.utils.checkpoint) run untouched, as it runs them "
    "again: call them without it while the context is open, so that they can be placed"
)
_LOCKING = "host memory was page-locked beside the first steps: tensors that found none yet were recomputed"
_WRITES_INPUT = "some regions write to their own input: a copy of it is kept for their backward"


class Observer(Protocol):
    """Sees a traced step go by (trace/live.py)."""

    def forward_mode(self, frame: Frame, engine: ActivationEngine) -> ForwardMode:
        """Return a mode that also records."""

    def cached(self, tensors: Iterable[Tensor]) -> None:
        """The region left these in a key/value cache."""

    def forward_ended(self, frame: Frame, mode: Any) -> None:
        """The region's forward is over."""

    def recompute_begins(self, frame: Frame) -> None:
        """The region's backward begins."""

    def inputs_landed(self) -> None:
        """What is on the device from here on is the backward's own."""

    def recompute_ended(self, frame: Frame) -> None:
        """Its recomputation is complete."""


class ActivationEngine:
    """Runs the regions of one model.

    Args:
        regions: (name, module) pairs, outermost only.
        transfers: carries tensors off the device and back.
        strict: compare every round trip's bytes.
    """

    def __init__(
        self, regions: Sequence[tuple[str, Module]], transfers: Transfers, *, strict: bool = False
    ) -> None:
        self.device = transfers.device
        self.transfers = transfers
        self.strict = strict
        self.observer: Observer | None = None
        self.clock: RegionClock | None = None
        self.on_recompute: Callable[[], None] | None = None
        self.on_call: Callable[[str], None] | None = None
        self.on_untouched: Callable[[Any], None] | None = None
        self.fragile: dict[str, frozenset[int]] = {}
        self.readers: dict[str, Readers] = {}
        self._skips: dict[str, RegionSkips] = {}
        self.written_inputs: dict[str, frozenset[int]] = {}
        self.written_buffers: dict[str, frozenset[int]] = {}
        self._changing: set[str] = set()
        self._op_lists: dict[str, list[Any]] = {}
        self.notes: dict[str, None] = {}
        self.plan = Plan()
        self.predicted = Prediction()
        """Of the plan in force; the bytes are the largest of all plans so far, as measured peaks are."""
        self.closed = False
        self._plans: dict[str, RegionPlan] = {}
        self._placements: dict[str, dict[int, tuple[str, Place]]] = {}
        self._patches: list[PatchedForward] = [
            RunsPatch(m, n, self._call)
            if isinstance(m, torch.nn.Sequential) and is_flat_sequential(m)
            else PatchedForward(m, n, self._call)
            for n, m in regions
        ]
        self._moving: weakref.WeakSet[Any] = weakref.WeakSet()
        self._live: weakref.WeakSet[Frame] = weakref.WeakSet()
        self._last: weakref.ref[Frame] | None = None
        self._num_calls: dict[str, int] = {}
        self._shared = SharedInputs()
        self._anchor = torch.empty(0, device=self.device)

    # - Life

    def attach(self) -> None:
        """Patch the regions."""
        for patch in self._patches:
            patch.install()

    def detach(self) -> None:
        """Leave every module as it was; live frames keep what they need."""
        for patch in reversed(self._patches):
            patch.remove()

    def close(self) -> None:
        """Detach and close the transfers; what live graphs still need comes home first.

        Nothing of the model or of the session is held afterwards, but by live frames.
        """
        self.detach()
        self._patches.clear()
        self.time_regions(None)
        self.observer = self.on_recompute = self.on_call = self.on_untouched = None
        self.closed = True
        try:
            for stored in list(self._moving):
                stored.settle()
        finally:
            self.transfers.close()

    @property
    def has_live_frames(self) -> bool:
        """Whether a graph still waits for its backward."""
        return len(self._live) > 0

    def use(self, plan: Plan) -> None:
        """Put a plan in force; frames already live keep what they have."""
        self.plan = plan
        self.predicted = plan.predicted.after(self.predicted)
        self.transfers.window_bytes = plan.window_bytes
        self._plans = {r.name: r for r in plan.regions}
        skips_before, self._placements, self._skips = self._skips, {}, {}
        for region in plan.regions:
            ops = [o for o in region.ops if o.placement != "recompute"]
            places: dict[int, tuple[str, Place]] = {o.position: (o.op, o.placement) for o in ops}
            skips = RegionSkips(self.readers.get(region.name, {}), places, self.notes)
            before = skips_before.get(region.name)
            if before is not None and before.of == skips.of:
                skips = before  # and what it has proven
            if skips.hollow:
                self._skips[region.name] = skips
                places.update({p: (name, "hollow") for p, name in skips.hollow.items()})
            self._placements[region.name] = places

    def begin_root(self) -> None:
        """A root forward starts: calls are numbered anew."""
        self._num_calls.clear()
        self._shared.clear()
        self.transfers.poll()

    def begins_anew(self, name: str) -> bool:
        """Whether the region was called since calls are numbered, and no graph of it is left."""
        return name in self._num_calls and not self._live

    def time_regions(self, clock: RegionClock | None) -> None:
        """Time the regions of the step that begins; None: stop."""
        self.clock = clock
        moved = self.transfers.moved
        moved.on_wait = clock.waited if clock is not None else None
        moved.on_copy = clock.copied if clock is not None else None

    # - A region call

    def _call(self, patch: PatchedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.on_call is not None:
            self.on_call(patch.name)
        name = self._call_name(patch.name)
        plan = self._plans.get(name, _RECOMPUTED)
        if plan.plain and self.observer is None:
            return self._untouched(name, patch, args, kwargs)
        if _in_other_checkpoint():
            self.notes[_CHECKPOINTED] = None
            return self._untouched(name, patch, args, kwargs)
        caches = EmptyCaches(patch.module, args, kwargs)
        if caches.filled:
            self.notes["regions called with a filled key/value cache run untouched"] = None
            return self._untouched(name, patch, args, kwargs)
        args, kwargs, had_cache = caches.taken_out(args, kwargs)
        if had_cache:
            self.notes["key/value caches are left empty by regions while gradients are on"] = None
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if not self._needs_gradient(patch.module, leaves):
            return caches.given_to(patch.plain)(*args, **kwargs)
        frame = Frame(name, patch.module, RngState.capture(self.device))
        self._enter(frame)
        written = self.written_inputs.get(name, frozenset())
        frame.pre_images.extend(PreImage(leaves[i]) for i in written)
        frame.keep_buffers(self.written_buffers.get(name, frozenset()))
        frame.call_args = leaves
        taken = frame.surroundings.take_arguments(leaves)
        frame.inputs = [self._slot(v, plan, name, i in written) for i, v in enumerate(taken)]
        try:
            seen = self.observer.cached if self.observer is not None else None
            plain = caches.given_to(patch.plain, seen)
            return self._checkpointed(frame, plain, (args, kwargs), spec)
        finally:
            frame.call_args = None

    def _checkpointed(
        self, frame: Frame, plain: Callable[..., Any], arguments: tuple[Any, Any], spec: Any
    ) -> Any:
        """Run a region; `arguments` flattened are `spec`. The frame must be held by nothing but the graph."""
        whole = [arguments]  # the caller's own lists: a region may add to them
        failed: list[BaseException] = []

        def call(values: list[Any]) -> Any:  # knows nothing of the frame, which holds it
            call_args, call_kwargs = pytree.tree_unflatten(values, spec)
            return plain(*call_args, **call_kwargs)

        def body(_: Tensor) -> Any:
            if frame.landed:
                return call(frame.landed[-1])
            own = whole.pop()
            try:
                return plain(*own[0], **own[1])
            except BaseException as error:  # noqa: BLE001 - raised again below
                # up to torch 2.12 checkpoint leaves its contexts by the end of a generator: after
                # an exception when its traceback dies (in a notebook: never), and out of order
                frame.raised = True
                failed.append(error)
                return None

        frame.call = call
        try:
            out = checkpoint(
                body,
                self._anchor,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=lambda: (ForwardContext(frame, self), RecomputeContext(frame, self)),
            )
        finally:
            whole.clear()
        if failed:
            raise failed.pop()
        return out

    def _untouched(
        self, name: str, patch: PatchedForward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        out = patch.plain(*args, **kwargs)
        if self.clock is not None:
            self.clock.untouched(name, out)
        if self.on_untouched is not None:
            self.on_untouched(out)
        return out

    def _call_name(self, name: str) -> str:
        count = self._num_calls.get(name, 0)
        self._num_calls[name] = count + 1
        return f"{name}#{count}" if count else name

    def _needs_gradient(self, module: Module, leaves: list[Any]) -> bool:
        if any(isinstance(v, Tensor) and v.requires_grad for v in leaves):
            return True
        return any(p.requires_grad for p in module.parameters())

    def _enter(self, frame: Frame) -> None:
        frame.previous = self._last
        self._last = weakref.ref(frame)
        self._live.add(frame)

    def _slot(self, leaf: Any, plan: RegionPlan, name: str, written: bool) -> Any:
        """Return what stands for one argument until backward; `written`: unseen, by the region."""
        if not isinstance(leaf, Tensor):
            return leaf
        stored = None
        if plan.input != "device" and self._movable(leaf):
            label = Label(region=name, what="input")
            stored = self._shared.out(
                leaf, lambda: self.store(leaf, plan.input, label, clone_first=written)
            )
        return InputSlot(leaf, stored)

    def _movable(self, tensor: Tensor) -> bool:
        return (
            is_plain(tensor)
            and tensor.device == self.device
            and not (tensor.is_leaf and tensor.requires_grad)
            and not isinstance(tensor, torch.nn.Parameter)
            and nbytes_of(tensor) >= MIN_MOVE_BYTES
            and is_dense(tensor)
        )

    def store(
        self,
        tensor: Tensor,
        placement: Placement,
        label: Label,
        *,
        clone_first: bool,
        wait: bool = True,
    ) -> Stored | None:
        """Start a tensor's way to host or ssd; None when its budget has no room.

        `wait` for host memory that is still being locked; else the caller recomputes this once.
        """
        moved = self.transfers.moved
        before = moved.num_early
        stored = self.transfers.store(tensor, placement, label, clone_first=clone_first, wait=wait)
        if stored is None:
            note = f"{self.transfers.full(placement)}: some tensors were recomputed or kept"
            self.notes[_LOCKING if moved.num_early > before else note] = None
            return None
        self._moving.add(stored)
        return Checked(stored, tensor, label) if self.strict else stored

    # - What the contexts ask for

    def forward_mode(self, frame: Frame) -> ForwardMode:
        """Return the mode for this call."""
        if self.clock is not None:
            self.clock.forward_begins(frame.name)
        if self.strict or self.observer is not None:
            frame.watch()
        if self.observer is not None:
            return self.observer.forward_mode(frame, self)
        placements = self._placements.get(frame.name, {})
        changing = frame.name in self._changing
        frame.skips = None if changing else self._skips.get(frame.name)
        return ForwardMode(
            frame,
            {} if changing else placements,
            self.fragile.get(frame.name, frozenset()),
            self.store,
            self.device,
            attention=_attention_placement(placements) if changing else None,
            strict=self.strict,
        )

    def forward_ended(self, frame: Frame, mode: Any) -> None:
        """Free what has arrived meanwhile."""
        if self.clock is not None:
            self.clock.forward_ends()
        if self.observer is not None:
            self.observer.forward_ended(frame, mode)
        if frame.skips is not None:
            frame.skips.prune(frame)
        self._watch(frame)
        if not self.closed:
            self.transfers.poll()

    def _watch(self, frame: Frame) -> None:
        """Note regions whose op list is not the same in every call, and those that write inputs.

        Positions mean nothing where ops come and go (experts that run or not): any placement stays
        exact, but only the input and attention are worth placing. A call that raised tells nothing.
        """
        if frame.raised:
            return
        last = self._op_lists.get(frame.name)
        if last is not None and last != frame.ops and frame.name not in self._changing:
            self._changing.add(frame.name)
            self.notes[_CHANGING] = None
        self._op_lists[frame.name] = frame.ops
        if frame.writes_input():
            self.notes[_WRITES_INPUT] = None

    def inputs_landed(self) -> None:
        """Let the observer know."""
        if self.observer is not None:
            self.observer.inputs_landed()

    def recompute_begins(self, frame: Frame) -> None:
        """Fetch what this region waits for, then what backward will ask for next."""
        if self.observer is not None:
            self.observer.recompute_begins(frame)
        if self.clock is not None:
            self.clock.recompute_begins(frame.name)
        if self.on_recompute is not None:
            self.on_recompute()
        if self.closed:
            return
        self.transfers.drain()
        self.transfers.poll()
        with self.transfers.together():
            for stored in frame.waiting():
                stored.prefetch()
        previous = frame.previous() if frame.previous is not None else None
        if previous is not None:
            with self.transfers.together():
                self._fetch_ahead(previous)

    def _fetch_ahead(self, frame: Frame) -> None:
        """Start fetches for the region that backward reaches next, whole tensors, in a window."""
        left = self.plan.prefetch_bytes
        for stored in frame.waiting():
            left -= stored.fetch_bytes
            if left < 0:
                return
            stored.prefetch()

    def recompute_ended(self, frame: Frame) -> None:
        """Tell the observer and the clock."""
        if self.clock is not None:
            self.clock.recompute_ends(frame.name)
        if self.observer is not None:
            self.observer.recompute_ended(frame)


def _in_other_checkpoint() -> bool:
    """Whether the program calls the region inside a checkpoint of its own, which runs all of it again.

    A reentrant one calls it in backward; its forward has no gradients. The other one takes what is saved.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    taken = hooks is not None and "_checkpoint_hook" in getattr(hooks[0], "__qualname__", "")
    return taken or torch._C._current_graph_task_id() != -1


def _attention_placement(placements: dict[int, tuple[str, Place]]) -> Placement | None:
    """Where a plan puts a region's attention, wherever it stands in the op list."""
    for name, placement in placements.values():
        if "attention" in name and placement != "hollow":
            return placement
    return None
