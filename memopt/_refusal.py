"""Refusing a budget that no plan keeps: before any op runs, or in the traced step before weights change.

Where a dry run on fake tensors can be made (_dry_run.py), it tells at the first root forward.
The traced step runs in the safest placement. Where the device is host memory, nothing bounds it but
this file: the moment live tensors exceed the budget there, the step ends with a BudgetError. What is
only there because the step is traced, and what a plan could still move (tensors saved outside
regions, to SSD), is taken off first; and in backward a step that nothing recomputes must not fit
either, for with few regions that one can be the smallest. So whoever is refused here would be
refused by the planner.

A step that comes through is judged when its backward has ended, before the optimizer runs: by then
everything is known but the optimizer's own needs, and those come from a step on fake tensors.
On CUDA the allocator's cap ends a step that is too large; `least_after` says what it would take.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import Module
from torch.utils._python_dispatch import _disable_current_modes

from memopt._dry_run import dry_run
from memopt._planning import usable_host_bytes
from memopt._resources import Resources
from memopt._states import expected_grad_bytes, missing_optimizer_bytes, optimizer_peak_bytes
from memopt._steps import Steps
from memopt.activations.observe import RegionObserver
from memopt.plan.cost import assumed_hardware, slack_of
from memopt.plan.smallest import MIB, advice, budget_for, check_budget, smallest_budget
from memopt.types.errors import BudgetError
from memopt.types.hardware import Hardware
from memopt.types.sizes import format_bytes, parse_size
from memopt.types.trace import RegionTrace, StepTrace

_AMPLE = 16
"""A budget this many times the states' bytes is not worth a dry run."""
DRY_RUN_DEVICES = {"cpu"}
"""Where a dry run's verdict counts. On CUDA it has not been held against real steps: there the allocator's cap ends
a step that is too large, and a wrong refusal would be the greater harm."""

_MOST_FOR_A_MOMENT = 4
"""No optimizer in use holds more than this many times the gradients' bytes while it steps."""


class BudgetGuard:
    """Watches a session's traced step.

    Args:
        resources: the budget, and where the accounting is.
        steps: figures of the step that goes by.
        optimizer: whose step comes after the backward, or None.
    """

    def __init__(
        self, resources: Resources, steps: Steps, optimizer: torch.optim.Optimizer | None
    ) -> None:
        self._resources = resources
        self._steps = steps
        self._optimizer = optimizer
        self._observer: RegionObserver | None = None
        self._coming_bytes = 0
        self._root_runs = False
        self.why_not_foreseen = "no forward was seen"
        """Why there was no dry run, or empty."""

    # - Before the step

    def foresee(
        self,
        model: Module,
        regions: Sequence[tuple[str, Module]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Judge the step that is about to begin by a dry run; where there is none, the step itself will tell.

        Raises:
            BudgetError: no plan keeps the budget, not even what the dry run sees of it.
        """
        if self.why_not_foreseen != "no forward was seen":
            return
        if self._resources.device.type not in DRY_RUN_DEVICES:
            self.why_not_foreseen = f"not on {self._resources.device.type}"
            return
        budget = self._resources.budget.device_bytes
        states = (
            self._steps.figures.resident_bytes + self._coming_bytes + expected_grad_bytes(model)
        )
        if states * _AMPLE <= budget:
            self.why_not_foreseen = f"the budget is {_AMPLE} times what the model's states take"
            return
        try:
            seen = dry_run(model, regions, args, kwargs, self._resources.device)
            trace = self._trace(seen, 0)
            least = self._smallest(trace, slack=0.0)
        except Exception as error:  # noqa: BLE001 - anyone's model, on tensors it was not written for
            self.why_not_foreseen = f"{type(error).__name__}: {error}"
            return
        self.why_not_foreseen = ""
        if least - MIB < budget:  # whole MiB, and what a dry run counts too much is less than that
            return
        try:
            self._check(trace)
        except BudgetError as error:
            self.rest()
            raise BudgetError(
                f"{error} This is what a dry run on fake tensors found, so a little more may be needed; "
                "nothing was run."
            ) from None

    # - The step goes by

    def root_begins(self, observer: RegionObserver) -> None:
        """A root forward of the traced step begins."""
        if self._observer is None:
            with _disable_current_modes():
                self._coming_bytes = missing_optimizer_bytes(self._optimizer)
        self._observer = observer
        self._root_runs = True
        accounted = self._resources.accounted
        if accounted is not None:
            accounted.on_growth = self._grew

    def root_ends(self) -> None:
        """It returned or raised."""
        self._root_runs = False

    def backward_ended(self) -> None:
        """The backward of the step is over, and nothing has changed weights yet.

        Raises:
            BudgetError: no plan keeps the budget.
        """
        observer = self._observer
        self.rest()
        if observer is None or not observer.records:
            return
        observer.close_backward()
        budget = self._resources.budget
        level = self._resources.meter.current_bytes() + self._coming_bytes
        matters = level + _MOST_FOR_A_MOMENT * self._steps.grad_bytes() > 0.9 * budget.device_bytes
        above = optimizer_peak_bytes(self._optimizer) if matters else 0
        self._check(self._trace(observer, above))

    def _check(self, trace: StepTrace) -> None:
        budget = self._resources.budget
        check_budget(
            trace,
            self._hardware(),
            device_bytes=budget.device_bytes,
            host_bytes=usable_host_bytes(budget),
            ssd_bytes=budget.ssd_bytes,
            staging_bytes=self._resources.staging_bytes or None,
        )

    def rest(self) -> None:
        """Stop watching until the next root forward of a traced step."""
        accounted = self._resources.accounted
        if accounted is not None:
            accounted.on_growth = None

    def end(self) -> None:
        """The traced step is over."""
        self.rest()
        self._observer = None

    # - Where the device is host memory

    def _grew(self, op: Any, current_bytes: int) -> None:
        """An op allocated: end the step if no plan could have kept it inside the budget."""
        observer = self._observer
        assert observer is not None
        level = (
            current_bytes + self._coming_bytes
        )  # a plan may do without buffers in front of an SSD
        budget = self._resources.budget.device_bytes
        if level <= budget:
            return
        level -= observer.tracing_bytes + self._movable_bytes(observer)
        if level <= budget or (observer.in_backward and self._untouched_bytes(observer) <= budget):
            return
        self.rest()  # once: whoever handles the error allocates, too
        with _disable_current_modes():
            least = self._least(observer, level)
        raise BudgetError(
            f"a device budget of {format_bytes(budget)} cannot be met: with everything recomputed, live "
            f"tensors{self._states_words()} reach {format_bytes(level)} in {observer.where()}, at {op}. "
            f"{_lower_bound(least)} Parameters and optimizer state are as they were before the step. "
            f"{advice(self._resources.device.type)}"
        )

    def _states_words(self) -> str:
        coming = self._coming_bytes
        return f" and {format_bytes(coming)} of optimizer state still to come" if coming else ""

    def _movable_bytes(self, observer: RegionObserver) -> int:
        """Bytes saved outside regions that a plan could have on SSD now."""
        if self._resources.io is None or observer.outside is None:
            return 0
        standing = observer.outside_standing_bytes
        moves_all = self._root_runs or standing is None
        return int(observer.outside.saved_bytes) if moves_all else int(standing or 0)

    def _untouched_bytes(self, observer: RegionObserver) -> int:
        """Least that the step takes where nothing is recomputed, as the planner counts it."""
        with _disable_current_modes():
            traces = observer.region_traces()
        kept = (
            max(t.saved_nbytes, sum(op.saved_nbytes for op in t.ops) + t.input_nbytes)
            for t in traces
        )
        return self._steps.figures.resident_bytes + self._coming_bytes + sum(kept)

    # - What it would take

    def least_after(self, error: object) -> str:
        """Return a sentence on the smallest budget after the allocator's refusal; empty if nothing is known."""
        observer = self._observer
        if observer is None:
            return ""
        try:
            return _lower_bound(self._least(observer, _asked_bytes(str(error))))
        except Exception:  # noqa: BLE001 - a device out of memory fails in many ways; the error itself goes on
            return ""

    def _least(self, observer: RegionObserver, level: int) -> int:
        """Return a lower bound of the smallest budget, in an unfinished step that came to `level` bytes."""
        slack = slack_of(self._resources.device.type)
        least = budget_for(level, slack)
        trace = self._trace(observer, 0, observer.partial_traces())
        if not trace.regions:
            return least
        return max(least, self._smallest(trace, slack))

    def _smallest(self, trace: StepTrace, slack: float) -> int:
        budget = self._resources.budget
        return smallest_budget(
            trace,
            self._hardware(),
            host_bytes=usable_host_bytes(budget),
            ssd_bytes=budget.ssd_bytes,
            staging_bytes=self._resources.staging_bytes or None,
            slack=slack,
        )

    def _trace(
        self,
        observer: RegionObserver,
        above_bytes: int,
        regions: tuple[RegionTrace, ...] | None = None,
    ) -> StepTrace:
        if observer.outside is not None:
            self._steps.figures.outside_saved_bytes = observer.outside.saved_bytes
        return self._steps.trace(
            observer,
            self._resources.device.type,
            coming=(self._coming_bytes, max(self._coming_bytes, above_bytes)),
            regions=regions,
        )

    def _hardware(self) -> Hardware:
        """Ways off the device without their rates: bytes do not depend on them."""
        assumed = assumed_hardware(self._resources.device.type)
        if self._resources.io is None:
            return assumed
        return replace(assumed, ssd_write_bytes_per_s=1e18, ssd_read_bytes_per_s=1e18)


def _lower_bound(least: int) -> str:
    return (
        f"The step did not finish, so {least // MIB} MiB ({least} bytes) is a lower bound of the "
        "smallest budget that works."
    )


def _asked_bytes(message: str) -> int:
    """Return what was allocated and asked for, from PyTorch's words; 0 where they are others."""
    asked = re.search(r"Tried to allocate ([\d.]+ [KMG]iB)", message)
    held = re.search(r"allocated memory ([\d.]+ [KMG]iB) is allocated by PyTorch", message)
    if asked is None or held is None:
        return 0
    return sum(int(parse_size(found[1], name="memory")) for found in (asked, held))
