"""When a session's plan changes: after the traced step, after a timed one, and when gradients stay.

Plans switch only at a root forward without a live frame. A step is timed that began with its plan
in force and no host memory being locked. The first such step gives a new plan. The second, which
runs that plan, only corrects what it predicts: the less a step waits, the hotter and slower the
device computes, which no step of another plan can show.
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


class Replanning:
    """The planner of a session, the plan that waits for its turn, and the step that is timed."""

    def __init__(self) -> None:
        self.planner: Planner | None = None
        self.next_plan: Plan | None = None
        self._timed_step: int | None = None
        self._num_timed = 0

    def begin(self, planner: Planner) -> None:
        """The traced step ended: make the first plan."""
        self.planner = planner
        self.next_plan = planner.plan()

    def at_root(self, engine: ActivationEngine, resources: Resources, steps: Steps) -> None:
        """Put a new plan in force where this step shows what the trace could not."""
        planner = self.planner
        if planner is None or engine.has_live_frames:
            return
        stale = planner.sees_gradients(steps.grad_bytes())
        if self._timed_step is not None and steps.num_steps > self._timed_step:
            self._calibrate(planner, engine, resources, steps)
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
        undisturbed = steps.num_steps >= _TIMES_FROM and not resources.is_locking
        if undisturbed and self._num_timed < _TIMED_STEPS and not steps.begun:
            self._timed_step = steps.num_steps
            steps.exposed_before = resources.transfers.moved.exposed_s
            engine.time_regions(RegionClock(resources.meter))

    def _calibrate(
        self, planner: Planner, engine: ActivationEngine, resources: Resources, steps: Steps
    ) -> None:
        """Correct the trace by the step that just ended."""
        step_s, exposed_s = steps.last_step(resources.transfers.moved.exposed_s)
        times = engine.clock.times() if engine.clock is not None else {}
        planner.calibrate(engine.plan, step_s, exposed_s, times)
        engine.time_regions(None)
        self._timed_step = None
        self._num_timed += 1
