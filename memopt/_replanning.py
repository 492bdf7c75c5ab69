"""When a session's plan changes: after the traced step, after a timed one, when gradients stay, and over the budget.

Plans switch only at a root forward without a live frame. A step is timed that began with its plan
in force and no host memory being locked. The first such step gives a new plan. The second, which
runs that plan, only corrects what it predicts: the less a step waits, the hotter and slower the
device computes, which no step of another plan can show. (A third plan from these times filled the link
to the brim and lost more by waiting than it saved: benchmarks/LOG.md.) A step in which something ran forward
only (an evaluation with gradients, an exception) is timed again in the next one, a few times.
"""

from __future__ import annotations

from memopt._planning import Planner
from memopt._resources import Resources
from memopt._steps import Steps
from memopt.activations.clock import RegionClock
from memopt.activations.engine import ActivationEngine
from memopt.types.plan import Plan

_TIMES_FROM = 2
"""Steps before the one that is timed: one is traced, one more may compile kernels."""

_TIMED_STEPS = 2
_MAX_RETRIES = 3
_WAITING = (
    "a new plan waited because the graph of an earlier step was still alive (a kept loss or output); "
    "detach what you keep"
)


class Replanning:
    """The planner of a session, the plan that waits for its turn, and the step that is timed."""

    def __init__(self) -> None:
        self.planner: Planner | None = None
        self.next_plan: Plan | None = None
        self._timed_step: int | None = None
        self._first_step_of_plan = 0
        self._num_timed = 0
        self._num_retries = 0
        self._corrected = False

    def begin(self, planner: Planner) -> None:
        """The traced step ended: make the first plan."""
        self.planner = planner
        self.next_plan = planner.plan()

    def at_root(self, engine: ActivationEngine, resources: Resources, steps: Steps) -> None:
        """Put a new plan in force where this step shows what the trace could not."""
        planner = self.planner
        if planner is None:
            return
        if self._timed_step is not None and steps.num_steps > self._timed_step:
            self._calibrate(planner, engine, steps)
        if engine.has_live_frames:
            if self.next_plan is not None and not steps.begun:
                engine.notes[_WAITING] = None
            return
        stale = planner.sees_gradients(steps.grad_bytes())
        if not steps.begun and steps.num_steps > self._first_step_of_plan > 0:
            stale |= planner.sees_peak(engine.plan, steps.last_step_peak_bytes)
        if self._corrected:
            self._corrected = False
            if self._num_timed == 1:
                stale = True
            else:
                engine.use(planner.with_prediction(engine.plan))
        if stale:
            self.next_plan = planner.plan()
        if self.next_plan is not None:
            engine.use(self.next_plan)
            resources.prepare(self.next_plan, planner.trace)
            engine.time_regions(None)
            self.next_plan = self._timed_step = None
            self._first_step_of_plan = steps.num_steps
        # the first step of a plan rehearses what may be skipped
        settled = steps.num_steps > self._first_step_of_plan and not resources.is_locking
        undisturbed = settled and steps.num_steps >= _TIMES_FROM
        if undisturbed and self._num_timed < _TIMED_STEPS and not steps.begun:
            self._timed_step = steps.num_steps
            engine.time_regions(RegionClock(resources.meter))

    def _calibrate(self, planner: Planner, engine: ActivationEngine, steps: Steps) -> None:
        """Correct the trace by the step that just ended."""
        clock = engine.clock
        assert clock is not None
        engine.time_regions(None)
        self._timed_step = None
        if not clock.is_whole and self._num_retries < _MAX_RETRIES:
            self._num_retries += 1
            return
        self._num_timed += 1
        self._corrected = True
        if not clock.is_full:
            planner.calibrate(engine.plan, steps.last_step_s(), clock)
