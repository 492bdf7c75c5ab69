"""Sessions: `optimize` around a training loop.

    measure the step, solve for where its bytes live, run that plan, report what really happened

The first step runs in the safest placement (everything recomputed) and is traced; the plan made from
it is in force from the second step on, on CUDA once another step was timed and the plan's host memory is
locked (`_replanning.py`). A step ends at `optimizer.step()`, or without an optimizer at
the next root forward after a backward; plans switch only at a root forward without a live frame.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

from memopt._forks import leave_in_children
from memopt._planning import Planner, first_plan, read_plan
from memopt._refusal import BudgetGuard
from memopt._replanning import Replanning
from memopt._reporting import make_report
from memopt._resources import Resources, open_resources
from memopt._settings import EngineChoice, Settings
from memopt._states import expected_grad_bytes
from memopt._steps import Steps
from memopt._takeover import (
    UNSTEPPED,
    CheckpointingOff,
    check_model,
    check_regions,
    stepping_optimizer,
    warn_unstepped,
)
from memopt.activations.compiled import compiled_notes, note_unseen_forward
from memopt.activations.engine import ActivationEngine
from memopt.activations.observe import RegionObserver
from memopt.activations.outside import OutsideHooks
from memopt.activations.patch import PatchedForward
from memopt.activations.regions import RegionSpec, find_regions
from memopt.activations.tensors import storage_key, tensors_in
from memopt.report import RunReport
from memopt.types.budget import Budget, ResolvedBudget
from memopt.types.errors import ConfigError
from memopt.types.plan import Plan
from memopt.types.trace import StepTrace

_OUT_OF_MEMORY = (
    "out of device memory inside memopt's budget: raise the device budget, run a smaller batch or "
    "sequence, or try plan='recompute' and the smaller of the two peaks above; something beside "
    "the loop that holds device memory (another model, kept outputs) counts against the budget too"
)


class Session:
    """One model under one budget, from `start` to `stop`.

    Args:
        model: the root module; its forward is one forward of a step.
        optimizer: its `step()` ends a step; None: the next forward after a backward does.
        settings: what `optimize` was asked for.
    """

    def __init__(
        self, model: Module, optimizer: torch.optim.Optimizer | None, settings: Settings
    ) -> None:
        check_model(model)
        self.model = model
        self.optimizer = stepping_optimizer(optimizer)
        self.settings = settings
        self.notes: list[str] = []
        self._replanning = Replanning()
        self._num_roots_open = 0
        self._asked_plan = read_plan(settings.plan)
        self._regions = find_regions(model, settings.regions)
        check_regions(model, self._regions)
        self._resources: Resources | None = None
        self._engine: ActivationEngine | None = None
        self._exit = contextlib.ExitStack()
        self._observer: RegionObserver | None = None
        self._report: RunReport | None = None
        self._hooks: OutsideHooks | None = None

    # - Life

    def start(self) -> Session:
        """Open the context."""
        if self._resources is not None:
            raise ConfigError("this session was started before; make a new one with memopt.start()")
        resources = open_resources(
            self.model, self.optimizer, self.settings.budget, self.settings.engine, self._asked_plan
        )
        self._resources = resources
        try:
            self._open(resources)
        except BaseException:
            self._exit.close()
            resources.close()
            raise
        return self

    def _open(self, resources: Resources) -> None:
        self.notes.extend(resources.notes)
        engine = ActivationEngine(self._regions, resources.transfers, strict=self.settings.strict)
        self._engine = engine
        self._steps = Steps(
            resources.meter,
            self.model,
            self.optimizer,
            resources.beside_bytes,
            lambda: resources.transfers.moved.ssd_write_bytes,
        )
        self._guard = BudgetGuard(resources, self._steps, self.optimizer)
        if self.optimizer is None:
            self._steps.on_backward_end = self._guard.backward_ended
        self._observer = RegionObserver(
            resources.meter, self._steps.grad_bytes, expected_grad_bytes(self.model)
        )
        engine.use(first_plan(self._regions, resources.safest_input))
        engine.observer = self._observer
        engine.on_recompute = self._steps.backward_begins
        engine.on_call = self._region_called
        engine.on_untouched = self._region_untouched
        if not self._regions:
            self.notes.append(
                "no region found (no list of blocks): name some with regions=[...]; only tensors "
                "saved outside regions can move"
            )
        self.notes.extend(compiled_notes(self._regions, resources.device.type))
        self._checkpointing = CheckpointingOff(self.model)
        self._exit.callback(self._checkpointing.restore)
        self._note_checkpointing()
        leave_in_children(self._exit)
        engine.attach()
        self._exit.callback(engine.detach)
        root = PatchedForward(self.model, "", self._root_call).install()
        self._exit.callback(root.remove)
        if self.optimizer is not None:
            before = self.optimizer.register_step_pre_hook(self._before_step)
            self._exit.callback(before.remove)
            after = self.optimizer.register_step_post_hook(self._after_step)
            self._exit.callback(after.remove)

    def stop(self) -> None:
        """Close the context: the model is as it was, every buffer, file and thread is gone."""
        if self._resources is None or self._resources.closed:
            return
        self._resources.check_thread()
        try:
            if self._report is None:
                self._finish()
        finally:
            self._close()

    def _finish(self) -> None:
        """Take the last figures, while there is something to take them from."""
        self._note_unstepped()
        self._check_seen(warn=False)  # a warning made an error must not keep the context open
        self._guard.end()
        self._steps.finish()
        if self._engine is not None and self._engine.observer is None:
            self._steps.end_step(final=True)
        self._report = self.report()

    def _close(self) -> None:
        assert self._engine is not None
        assert self._resources is not None
        try:
            self._exit.close()
        finally:
            try:
                self._engine.close()
            finally:
                self._resources.close()
                self._let_go()

    def _let_go(self) -> None:
        """Hold neither model nor optimizer: whoever keeps a session for its report keeps no weights.

        Nor in cycles, which would keep them until the collector comes by.
        """
        self._regions = []
        self._observer = self._hooks = None
        del self.model, self.optimizer, self._steps, self._guard, self._checkpointing

    def __enter__(self) -> Session:
        """Start."""
        return self.start()

    def __exit__(self, *exc: object) -> None:
        """Stop, also after an exception; out of memory gets memopt's own table and what to do."""
        error = exc[1] if len(exc) > 1 else None
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        least = self._guard.least_after(error) if out_of_memory else ""
        self.stop()
        if out_of_memory:
            sys.stderr.write(f"{self.report()}\n{_OUT_OF_MEMORY}\n{least}\n")

    # - What a user may ask

    @property
    def trace(self) -> StepTrace | None:
        """The traced step, its times corrected by later ones; None before the first step ended."""
        planner = self._replanning.planner
        return planner.trace if planner is not None else None

    @property
    def plan(self) -> Plan:
        """The plan in force, or the one that waits to come into force."""
        assert self._engine is not None, "the session has not started"
        return self._replanning.next_plan or self._engine.plan

    @property
    def budget(self) -> ResolvedBudget:
        """The budget, resolved on this machine."""
        assert self._resources is not None, "the session has not started"
        return self._resources.budget

    def report(self) -> RunReport:
        """What was predicted and measured so far; after the context, of the whole run."""
        if self._report is not None:
            return self._report
        assert self._resources is not None, "the session has not started"
        assert self._engine is not None
        if self._resources.closed:
            raise ConfigError("the session was interrupted while it stopped: it has no report")
        plan = self._replanning.reported(self._engine, self._steps)
        notes = [*self.notes, *self._engine.notes, *plan.notes, *self._replanning.notes()]
        predicted = plan.predicted.after(self._engine.predicted)
        return make_report(self._resources, self._steps, self.trace, plan, predicted, notes)

    # - The loop going by

    def _root_call(
        self, patch: PatchedForward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        engine = self._engine
        assert engine is not None
        self._begin(args, kwargs)
        if self._observer is not None and not self._num_roots_open:
            self._guard.foresee(self.model, self._regions, args, kwargs)
        self._num_roots_open += 1
        try:
            with self._outside(engine, (args, kwargs)):
                out = patch.plain(*args, **kwargs)
        finally:
            self._num_roots_open -= 1
            self._steps.end_root()
            self._guard.root_ends()
        self._steps.watch(out)
        return out

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward with gradients begins: the place where steps end and plans switch."""
        assert self._engine is not None
        assert self._resources is not None
        if self.optimizer is None and self._steps.saw_backward:
            self._end_step()
        self._note_checkpointing()
        self._replanning.at_root(self._engine, self._resources, self._steps)
        self._engine.begin_root()
        if self._observer is not None:
            self._observer.begin_root()
        self._steps.begin_root(args, kwargs)
        warn_unstepped(self.optimizer, self._steps)
        if self._observer is not None:
            self._guard.root_begins(self._observer)

    def _note_unstepped(self) -> None:
        if self.optimizer is not None and not self._steps.num_steps and self._steps.saw_backward:
            self.notes.append(UNSTEPPED)

    def _note_checkpointing(self) -> None:
        note = self._checkpointing.switch()
        if note and note not in self.notes:
            self.notes.append(note)

    def _region_called(self, name: str) -> None:
        """A region runs; where the loop calls regions itself, the first one begins the step."""
        if self._num_roots_open:
            return
        if not self._steps.begun or (self.optimizer is None and self._steps.saw_backward):
            self._begin((), {})
            self._engine_note("regions are called outside the model's own forward")
        elif self._engine is not None and self._engine.begins_anew(name):
            self._engine.begin_root()  # else calls are numbered for ever

    def _region_untouched(self, output: Any) -> None:
        """A region ran as it is: outside of the root's forward, nothing else shows its backward."""
        if not self._num_roots_open:
            self._steps.watch(output)

    def _engine_note(self, note: str) -> None:
        assert self._engine is not None
        self._engine.notes[note] = None

    def _outside(self, engine: ActivationEngine, given: Any) -> Any:
        """Return the hooks around the root's forward; what it was `given` is the program's, as weights are."""
        if self._observer is None and engine.plan.outside == "device":
            return contextlib.nullcontext()
        fixed = {
            storage_key(t)
            for t in (*self.model.parameters(), *self.model.buffers(), *tensors_in(given))
            if t.layout is torch.strided and type(t) in (torch.Tensor, torch.nn.Parameter)
        }
        where = "device" if self._observer is not None else engine.plan.outside
        self._hooks = OutsideHooks(engine, where, fixed)
        if self._observer is not None:
            self._observer.outside = self._hooks
        return self._hooks.hooks

    def _before_step(self, *_: Any) -> None:
        if self._observer is not None:
            self._observer.close_backward()
            if self._steps.saw_backward:
                self._guard.backward_ended()
        if self._engine is not None and self._engine.clock is not None:
            self._engine.clock.backward_ends()
        self._steps.begin_optimizer()

    def _after_step(self, *_: Any) -> None:
        self._steps.end_optimizer()
        self._check_seen()
        if self._steps.saw_backward:
            self._end_step()

    def _check_seen(self, *, warn: bool = True) -> None:
        """Say so where gradients come from forwards that no patch saw."""
        if not (self._steps.begun or self._steps.num_steps):
            note_unseen_forward(self.model, self.notes, warn=warn)

    def _end_step(self) -> None:
        """Close a step; the first one becomes the trace, and the plan follows from it."""
        observer, engine, resources = self._observer, self._engine, self._resources
        assert engine is not None
        assert resources is not None
        if observer is not None:
            self._guard.end()
            observer.close_backward()
            if self._hooks is not None:
                self._steps.figures.outside_saved_bytes = self._hooks.saved_bytes
            self._observer = engine.observer = None
            engine.fragile = observer.fragile()
            engine.written_inputs = observer.written_inputs()
            engine.written_buffers = observer.written_buffers()
            engine.readers = observer.readers()
            trace = self._steps.trace(observer, resources.device.type)
            planner = Planner(trace, self._asked_plan, resources, exact=self.settings.exact)
            self._replanning.begin(planner)
            self._note_unseen(observer)
        self._steps.end_step()

    def _note_unseen(self, observer: RegionObserver) -> None:
        fragile = observer.fragile()
        if fragile:
            ops = sorted(
                {
                    op.op
                    for r in (self.trace.regions if self.trace else ())
                    for op in r.ops
                    if op.position in fragile.get(r.name, ())
                }
            )
            self.notes.append(
                f"outputs of {', '.join(ops)} are written later by a kernel that PyTorch does not "
                "see (Triton, numpy); they are copied at birth where they are stored"
            )


class _Optimize(contextlib.ContextDecorator):
    """Context manager and decorator around a Session; a decorator starts a new one per call."""

    def __init__(self, make: Callable[[], Session]) -> None:
        self._make = make
        self._sessions: list[Session] = []

    def __enter__(self) -> Session:
        session = self._make()
        session.start()
        self._sessions.append(session)
        return session

    def __exit__(self, *exc: object) -> None:
        self._sessions.pop().__exit__(*exc)


def optimize(  # noqa: PLR0913 - the settings users know, spelled out for them and their editors
    model: Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    budget: Budget | None = None,
    plan: str | Path | Plan = "auto",
    regions: RegionSpec = None,
    exact: bool = True,
    strict: bool = False,
    engine: EngineChoice = "auto",
    update: str = "at_step",
) -> _Optimize:
    """Return a context manager (or decorator) under which the model trains inside a budget.

    Args:
        model: the root module that the loop calls.
        optimizer: the loop's optimizer; its `step()` ends a step. None: the next forward after a
            backward does.
        budget: bytes on device, host and SSD; None: what is free.
        plan: "auto", "recompute", "host", "ssd", "device", a Plan, or the path of a saved one.
        regions: names, modules or a predicate of (name, module); None: found.
        exact: use only placements whose bits are the plain loop's.
        strict: compare the bytes of every round trip through host memory and SSD.
        engine: I/O engine, "auto", "io_uring" or "threads"; only "auto" may fall back.
        update: when weights are updated; "at_step" is the only value.

    Raises:
        ConfigError: a setting is wrong, or the model is in a session already.
        BudgetError: no placement fits the budget.
    """
    settings = Settings(
        budget=budget, plan=plan, regions=regions, exact=exact, strict=strict, engine=engine,
        update=update,
    )  # fmt: skip
    return _Optimize(lambda: Session(model, optimizer, settings))


def start(  # noqa: PLR0913 - as optimize
    model: Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    budget: Budget | None = None,
    plan: str | Path | Plan = "auto",
    regions: RegionSpec = None,
    exact: bool = True,
    strict: bool = False,
    engine: EngineChoice = "auto",
    update: str = "at_step",
) -> Session:
    """Open a session for notebooks; call `run.stop()` at the end. Arguments as `optimize`."""
    settings = Settings(
        budget=budget, plan=plan, regions=regions, exact=exact, strict=strict, engine=engine,
        update=update,
    )  # fmt: skip
    return Session(model, optimizer, settings).start()
