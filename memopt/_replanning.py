"""When a session's plan changes: after the traced step, after timed ones, when gradients stay, and over the budget.

Plans switch only at a root forward without a live frame. A step is timed that began with its plan
in force and no host memory being locked.

- Where transfers are to be hidden on a GPU, the step after the traced one is timed in the same plan, the safest one:
  a plan from the trace's own times would send twice what can be hidden, and lock as much host memory.
- The plan that follows comes into force when its host memory is locked. Until then steps run as before: none waits
  for seconds, or finds no room for what it was to send.
- The first step timed in it may give another plan, where that is better. The last one that is timed only
  corrects what is predicted: the less a step waits, the hotter and slower the device computes, which no
  step of another plan can show.

A step in which something ran forward only (an evaluation with gradients, an exception), or of other shapes than the
traced one's (the last batch of an epoch), is timed again in the next one, a few times.
"""

from __future__ import annotations

from memopt._planning import Planner
from memopt._resources import Resources
from memopt._steps import Steps
from memopt.activations.clock import RegionClock
from memopt.activations.engine import ActivationEngine
from memopt.types.plan import Plan, Prediction
from memopt.types.sizes import format_bytes

_TIMES_FROM = 2
"""Steps before a planned one is timed: one is traced, one more may compile kernels."""

_TIMED_STEPS = 2
_MAX_RETRIES = 3
_LEAST_GAIN = 0.01
"""Of a step's time: for less, the plan in force stays. A new one rehearses, and may lock more host memory."""

_WAIT_S = 0.1
"""That long a step waits for host memory before it begins without it."""

_WAITING = (
    "a new plan waited because the graph of an earlier step was still alive (a kept loss or output); "
    "detach what you keep"
)
_TIMING = (
    "no plan yet: steps run in the placement of the first one (all is recomputed) until one of them was timed; "
    "the plan follows from it"
)
_LOCKING = (
    "a plan waits until its host memory is page-locked ({bytes}); until then steps run as before, and this report "
    "is of how they run"
)


class Replanning:
    """The planner of a session, the plan that waits for its turn, and the step that is timed."""

    def __init__(self) -> None:
        self.planner: Planner | None = None
        self.next_plan: Plan | None = None
        self._holds = False
        """Whether the first step's plan stays in force until a step was timed in it."""
        self._locking: Plan | None = None
        """Whose host memory is being locked, before it comes into force."""
        self._timed_step: int | None = None
        self._num_to_time = _TIMED_STEPS
        self._num_timed = 0
        self._num_retries = 0
        self._corrected = False

    def begin(self, planner: Planner) -> None:
        """The traced step ended: make the first plan, or have a step timed first."""
        self.planner = planner
        self._holds = planner.wants_times()
        if self._holds:
            self._num_to_time += 1
        else:
            self.next_plan = planner.plan()

    def at_root(self, engine: ActivationEngine, resources: Resources, steps: Steps) -> None:
        """Put a new plan in force where this step shows what the trace could not."""
        planner = self.planner
        if planner is None:
            return
        if self._timed_step is not None and steps.num_steps > self._timed_step:
            self._calibrate(planner, engine, steps)
        if engine.has_live_frames:
            if (self._holds or self.next_plan is not None) and not steps.begun:
                engine.notes[_WAITING] = None
            return
        self._plan(planner, engine, steps)
        if self.next_plan is not None and self._is_ready(planner, self.next_plan, resources):
            engine.use(self.next_plan)
            resources.prepare(self.next_plan, planner.trace)
            engine.time_regions(None)
            self.next_plan = self._locking = self._timed_step = None
            steps.plan_begins()
        if self.next_plan is None and self._num_timed < self._num_to_time and not steps.begun:
            self._time(planner, engine, resources, steps)

    def reported(self, engine: ActivationEngine, steps: Steps) -> Plan:
        """Return the plan that steps ran under, with what is predicted of it; after the first step, the coming one."""
        plan = engine.plan
        if self.next_plan is not None and steps.num_steps < 2:
            plan = self.next_plan
        if self.planner is None or plan.predicted != Prediction():
            return plan
        return self.planner.with_prediction(plan)

    def notes(self) -> list[str]:
        """Say what no plan, or the next one, is waiting for."""
        if self._holds:
            return [_TIMING]
        if self.next_plan is not None and self._locking is self.next_plan:
            return [_LOCKING.format(bytes=format_bytes(self.next_plan.predicted.host_bytes))]
        return []

    def _plan(self, planner: Planner, engine: ActivationEngine, steps: Steps) -> None:
        """Make a plan where what is known has changed."""
        stale = planner.sees_gradients(steps.grad_bytes())
        if self._holds and stale:
            self._holds = planner.wants_times()  # raises where no plan has room for them
        if not steps.begun and steps.num_steps > steps.first_of_plan > 0:
            stale |= planner.sees_peak(engine.plan, steps.last_step_peak_bytes)
        corrected, self._corrected = self._corrected, False
        if stale or (corrected and self._holds):
            self._holds &= not corrected
            if not self._holds:
                self.next_plan = planner.plan()
        elif corrected:
            now = planner.with_prediction(engine.plan)
            found = planner.plan() if self._num_timed < self._num_to_time else now
            if found.predicted.step_s < now.predicted.step_s * (1.0 - _LEAST_GAIN):
                self.next_plan = found
            else:
                engine.use(now)

    def _is_ready(self, planner: Planner, plan: Plan, resources: Resources) -> bool:
        """Whether the plan's host memory is locked, or its user asked for that very plan: else it is begun."""
        if not planner.is_free:
            return True
        wait_s = 0.0
        if self._locking is not plan:
            self._locking = plan
            resources.lock(plan, planner.trace)
            wait_s = _WAIT_S
        return resources.is_locked(wait_s)

    def _time(
        self, planner: Planner, engine: ActivationEngine, resources: Resources, steps: Steps
    ) -> None:
        """Time the step that begins, where nothing disturbs it."""
        if resources.is_locking:
            return
        if self._holds:
            engine.use(planner.with_prediction(engine.plan))
        # the first step of a plan rehearses what may be skipped
        settled = steps.num_steps > steps.first_of_plan and steps.num_steps >= _TIMES_FROM
        if settled or self._holds:
            self._timed_step = steps.num_steps
            engine.time_regions(RegionClock(resources.meter))

    def _calibrate(self, planner: Planner, engine: ActivationEngine, steps: Steps) -> None:
        """Correct the trace by the step that just ended."""
        clock = engine.clock
        assert clock is not None
        engine.time_regions(None)
        self._timed_step = None
        is_like = clock.is_whole and steps.last_shapes == planner.trace.shapes
        if not is_like and self._num_retries < _MAX_RETRIES:
            self._num_retries += 1
            return
        self._num_timed += 1
        self._corrected = True
        if not clock.is_full:
            planner.calibrate(engine.plan, steps.last_step_s(), clock)
