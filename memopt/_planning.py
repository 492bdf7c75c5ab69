"""From a trace to the plan in force, and from what a planned step showed to a better one.

The traced step is a poor clock: kernels compile in it, and nothing overlaps. So the first step
without either, in which no host memory is being locked, corrects the trace once, and the plan
follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median_high
from typing import Any

from torch.nn import Module

from memopt._resources import Resources
from memopt.activations.clock import RegionClock
from memopt.plan import check_budget, predict, smallest_budget, solve_greedy, uniform_plan
from memopt.trace.calibrate import recalibrated, with_micro_batches
from memopt.types.budget import ResolvedBudget
from memopt.types.errors import BudgetError, ConfigError
from memopt.types.hardware import Hardware
from memopt.types.plan import Placement, Plan, Prediction, RegionPlan
from memopt.types.sizes import format_bytes
from memopt.types.trace import StepTrace

_NONE_RAN = (
    "no region ran with gradients in the first step, so nothing is placed: name the modules that "
    "the loop calls with regions=[...]"
)
_UNIFORM = ("recompute", "host", "ssd", "device")
_SLOP_BYTES = 1 << 20
_HOST_MARGIN_BYTES = 1 << 30
_LINK_SHARE = 0.95
"""Of the link's rate, what plans count on: regions compute for longer in one step than in the next, and a link that is
filled to the brim overflows. On an H200 a plan that was to wait 2 ms waited 31; this room costs 0.3 % of a step."""


def read_plan(plan: str | Path | Plan) -> str | Plan:
    """Return what `plan=` asks for: "auto", one placement for everything, or a plan.

    Raises:
        ConfigError: none of these, nor the path of a saved plan.
    """
    if isinstance(plan, Plan) or plan == "auto" or plan in _UNIFORM:
        return plan
    if isinstance(plan, (str, Path)) and Path(plan).exists():
        return Plan.load(plan)
    raise ConfigError(
        f"plan={str(plan)!r} is not 'auto', {', '.join(map(repr, _UNIFORM))}, a memopt.Plan, or the "
        "path of a saved plan"
    )


def usable_host_bytes(budget: ResolvedBudget) -> int:
    """Return what plans may use of the host budget: buffers of odd sizes leave gaps."""
    return budget.host_bytes - min(budget.host_bytes // 64, _HOST_MARGIN_BYTES)


def first_plan(regions: Sequence[tuple[str, Module]], where: Placement) -> Plan:
    """Return the safest plan: everything recomputed, inputs off the device when they can be."""
    return Plan(
        regions=tuple(RegionPlan(name=name, input=where) for name, _ in regions),
        solver="first step",
    )


class Planner:
    """Makes the plan of a traced step and corrects it.

    Args:
        trace: the traced step.
        asked: "auto", a placement, or a plan.
        resources: budgets and the machine.
        exact: only placements whose bits are the plain loop's.
    """

    def __init__(
        self, trace: StepTrace, asked: str | Plan, resources: Resources, *, exact: bool
    ) -> None:
        self.trace = trace
        self._asked = asked
        self._resources = resources
        self._exact = exact
        self._micro_batches = [trace.num_micro_batches]
        """Of the steps that were looked at: the last of an epoch may have fewer than the others."""
        self._is_link_seen = False
        self._excess_bytes = 0
        """What a step held on the device beyond its plan's prediction, where that broke the budget."""
        self._probed: Hardware | None = resources.hardware() if trace.regions else None
        self._hardware = self._probed

    def plan(self) -> Plan:
        """Return the plan for the trace as it is now known."""
        if self._hardware is None:
            empty = self._asked if isinstance(self._asked, Plan) else Plan(solver="no regions")
            return replace(empty, notes=(*empty.notes, _NONE_RAN))
        if self._asked == "auto":
            return self._solve()
        asked = self._asked
        plan = asked if isinstance(asked, Plan) else uniform_plan(self.trace, asked)
        return self.with_prediction(plan)

    def wants_times(self) -> bool:
        """Whether a step shall be timed in the plan in force before one is made from the trace's bytes and its times.

        So it is where transfers are to be hidden on a device that computes by itself: the trace says what each op
        takes alone, with the host's work between them, and a plan from that sends twice what can be hidden, and locks
        as much host memory.

        Raises:
            BudgetError: no plan fits.
        """
        if self._hardware is None or self._asked != "auto" or self.trace.device == "cpu":
            return False
        budget = self._resources.budget
        return not check_budget(
            self.trace, self._hardware, device_bytes=budget.device_bytes, **self._room()
        )

    @property
    def is_free(self) -> bool:
        """Whether memopt chooses the plan."""
        return self._asked == "auto"

    def _room(self) -> dict[str, Any]:
        """What plans may use beside the device, as the solver takes it."""
        budget = self._resources.budget
        return {
            "host_bytes": usable_host_bytes(budget),
            "ssd_bytes": budget.ssd_bytes,
            "staging_bytes": self._resources.staging_bytes or None,
        }

    def _solve(self) -> Plan:
        """Solve for what the budget leaves when a surprise of an earlier step is set aside."""
        assert self._hardware is not None
        hardware = self._hardware
        if hardware.device != "cpu":
            hardware = replace(
                hardware,
                d2h_bytes_per_s=hardware.d2h_bytes_per_s * _LINK_SHARE,
                h2d_bytes_per_s=hardware.h2d_bytes_per_s * _LINK_SHARE,
            )
        budget, excess = self._resources.budget, self._excess_bytes
        room = self._room()
        solve = partial(solve_greedy, self.trace, hardware, exact=self._exact, **room)
        if not excess:
            return self.with_prediction(solve(device_bytes=budget.device_bytes))
        try:
            plan = solve(device_bytes=budget.device_bytes - excess)
            note = (
                f"a step held {format_bytes(excess)} more than planned; now that much is set aside"
            )
        except BudgetError:
            plan = solve(device_bytes=smallest_budget(self.trace, hardware, **room))
            note = (
                f"steps hold {format_bytes(excess)} more than planned, and no plan is that much smaller: the "
                f"device budget of {format_bytes(budget.device_bytes)} is exceeded; raise it, or make the batch smaller"
            )
        return self.with_prediction(replace(plan, notes=(*plan.notes, note)))

    def with_prediction(self, plan: Plan) -> Plan:
        """Return `plan` with what is predicted of it now."""
        return replace(plan, predicted=self._predict(plan)) if self._hardware is not None else plan

    def _predict(self, plan: Plan) -> Prediction:
        assert self._hardware is not None
        predicted = predict(
            self.trace, plan, self._hardware, staging_bytes=self._resources.staging_bytes
        )
        return replace(predicted, device_bytes=predicted.device_bytes + self._excess_bytes)

    def sees_peak(self, plan: Plan, peak_bytes: int) -> bool:
        """Note what a step under `plan` held; True where it broke the budget, and a new plan is due."""
        if self._hardware is None or self._asked != "auto":
            return False
        excess = peak_bytes - (plan.predicted.device_bytes - self._excess_bytes)
        if peak_bytes <= self._resources.budget.device_bytes or excess <= self._excess_bytes:
            return False
        self._excess_bytes = excess
        return True

    def sees_gradients(self, grad_bytes: int) -> bool:
        """Note the gradients alive at a root forward; True where the plan counted on fewer."""
        more = grad_bytes - self.trace.grad_bytes_at_start
        if more <= _SLOP_BYTES or self._hardware is None:
            return False
        self.trace = replace(
            self.trace,
            grad_bytes_at_start=grad_bytes,
            resident_bytes=self.trace.resident_bytes + more,
        )
        return True

    def calibrate(self, plan: Plan, step_s: float, clock: RegionClock) -> None:
        """Correct the trace by a step that ran under `plan`: its regions' times, and the link's rate.

        The rate is what the step's copies showed. The first step's waits are not evidence against it: that
        step's plan came from the trace's times and may have asked for twice what the step hides. What the next
        plan waits beyond its prediction is.

        Args:
            plan: in force in that step.
            step_s: its time.
            clock: marked its regions, the link's copies, and when compute waited for transfers.
        """
        if self._hardware is None or step_s <= 0.0:
            return
        exposed_s = clock.waited_s()
        num_micro_batches = clock.num_micro_batches or self.trace.num_micro_batches
        compute_s = max(0.0, step_s - exposed_s)
        self.trace = recalibrated(self.trace, plan, compute_s, clock.times(), num_micro_batches)
        newly_seen = self._see_link(clock)
        predicted = self._predict(plan)
        if predicted.exposed_s - exposed_s > 0.01 * predicted.step_s:
            self._hardware = self._probed  # the step before was no example: longer, disturbed
            predicted = self._predict(plan)
        if not newly_seen:
            self._slow_down_link(predicted, exposed_s)
        self._micro_batches.append(num_micro_batches)
        self.trace = with_micro_batches(self.trace, median_high(self._micro_batches))

    def _see_link(self, clock: RegionClock) -> bool:
        """Take the link's rates from the first step with enough copies; True in that step.

        A probe's large copy alone may be faster: these shared the device's memory with compute.
        """
        out, back = clock.link_bytes_per_s("d2h"), clock.link_bytes_per_s("h2d")
        if self._probed is None or self._is_link_seen or out is None or back is None:
            return False
        source = f"{self._probed.source}, link as a step's copies showed"
        self._probed = self._hardware = replace(
            self._probed, d2h_bytes_per_s=out, h2d_bytes_per_s=back, source=source
        )
        self._is_link_seen = True
        return True

    def _slow_down_link(self, predicted: Prediction, exposed_s: float) -> None:
        """Where transfers held compute up longer than predicted, plan as if the link were slower.

        An exposed byte costs several times what recomputing it does.
        """
        surprise = exposed_s - predicted.exposed_s
        hardware = self._hardware
        if hardware is None or predicted.d2h_bytes <= 0 or surprise <= 0.01 * predicted.step_s:
            return
        ideal_s = predicted.d2h_bytes / hardware.d2h_bytes_per_s
        factor = ideal_s / (ideal_s + surprise)
        self._hardware = replace(
            hardware,
            d2h_bytes_per_s=hardware.d2h_bytes_per_s * factor,
            h2d_bytes_per_s=hardware.h2d_bytes_per_s * factor,
            source=f"{hardware.source}, times {factor:.2f} as a step waited",
        )
