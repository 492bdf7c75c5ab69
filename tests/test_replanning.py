"""When plans come into force: a session's planner, engine, resources and steps as their smallest stand-ins."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from memopt._replanning import Replanning
from memopt.types.errors import BudgetError
from memopt.types.plan import Plan, Prediction, RegionPlan

SAFE = Plan(regions=(RegionPlan(name="r", input="host"),), solver="first step")


def plan_of(step_s: float) -> Plan:
    return replace(SAFE, solver=f"{step_s} s", predicted=Prediction(step_s=step_s))


class Loop:
    """A loop of steps of one second; `plans` are what the planner finds, in order."""

    def __init__(
        self, plans: list[Plan], *, wants_times: bool = True, is_free: bool = True
    ) -> None:
        self.plans = plans
        self.wants = wants_times
        self.planner: Any = SimpleNamespace(
            is_free=is_free,
            trace=SimpleNamespace(shapes="(4,)"),
            wants_times=lambda: self.wants,
            plan=lambda: self.plans.pop(0),
            sees_gradients=lambda _: False,
            sees_peak=lambda *_: False,
            with_prediction=lambda plan: plan,
            calibrate=lambda *_: None,
        )
        self.used: list[tuple[int, str]] = []
        self.locked_at = 0
        self.began_locking: list[int] = []
        self.waits: list[float] = []
        self.timed: list[int] = []
        self.steps: Any = SimpleNamespace(
            num_steps=0,
            first_of_plan=0,
            plan_begins=self.plan_begins,
            begun=False,
            last_step_peak_bytes=0,
            last_shapes="(4,)",
            grad_bytes=lambda: 0,
            last_step_s=lambda: 1.0,
        )
        self.engine: Any = SimpleNamespace(
            plan=SAFE,
            has_live_frames=False,
            notes={},
            clock=None,
            use=self.use,
            time_regions=self.time,
        )
        self.resources: Any = SimpleNamespace(
            meter=None, lock=self.lock, is_locked=self.is_locked, prepare=lambda *_: None
        )
        self.replanning = Replanning()

    def use(self, plan: Plan) -> None:
        if plan is not self.engine.plan:
            self.used.append((self.steps.num_steps, plan.solver))
        self.engine.plan = plan

    def plan_begins(self) -> None:
        self.steps.first_of_plan = self.steps.num_steps + self.steps.begun

    def time(self, clock: Any) -> None:
        self.engine.clock = clock and SimpleNamespace(is_whole=True, is_full=False)
        if clock:
            self.timed.append(self.steps.num_steps)

    def lock(self, *_: Any) -> None:
        self.began_locking.append(self.steps.num_steps)

    def is_locked(self, wait_s: float) -> bool:
        self.waits.append(wait_s)
        return self.steps.num_steps >= self.locked_at

    def run(self, num_steps: int) -> None:
        """One traced step, then `num_steps` others."""
        self.replanning.begin(self.planner)
        for _ in range(num_steps):
            self.steps.num_steps += 1
            self.resources.is_locking = bool(self.began_locking) and not (
                self.steps.num_steps >= self.locked_at
            )
            self.replanning.at_root(self.engine, self.resources, self.steps)


def test_a_step_is_timed_in_the_first_plan_before_another_is_made():
    loop = Loop([plan_of(0.9), plan_of(0.8)])
    loop.run(8)
    assert loop.timed == [1, 3, 5], (
        "the safest plan's step, and one of each plan after its rehearsal"
    )
    assert loop.used == [(2, "0.9 s"), (4, "0.8 s")]


def test_a_plan_waits_until_its_memory_is_locked():
    loop = Loop([plan_of(0.9), plan_of(0.9)])
    loop.locked_at = 5
    loop.run(8)
    assert loop.used[0] == (5, "0.9 s")
    assert loop.began_locking == [2], "once"
    assert loop.waits == [0.1, 0.0, 0.0, 0.0], "one step waits, and not for long"
    assert loop.timed == [1, 6, 7], "not while memory is locked"


def test_a_plan_that_is_hardly_better_stays_out():
    loop = Loop([plan_of(0.9), plan_of(0.897), plan_of(0.5)])
    loop.run(10)
    assert loop.used == [(2, "0.9 s")]
    assert len(loop.plans) == 1, "no third plan is made"


@pytest.mark.parametrize("is_free", [True, False])
def test_a_plan_that_needs_no_times_comes_at_once(is_free):
    loop = Loop([plan_of(0.9), plan_of(0.8)], wants_times=False, is_free=is_free)
    loop.run(6)
    assert loop.used == [(1, "0.9 s"), (3, "0.8 s")]
    assert loop.timed == [2, 4]
    if not is_free:
        assert loop.began_locking == [], "what the user asked for is not put off"


def test_gradients_that_leave_no_room_are_refused_before_a_step_is_timed():
    loop = Loop([plan_of(0.9)])
    loop.replanning.begin(loop.planner)
    loop.steps.num_steps = 1
    loop.planner.sees_gradients = lambda _: True

    def refuse() -> bool:
        raise BudgetError("no plan fits")

    loop.planner.wants_times = refuse
    with pytest.raises(BudgetError, match="no plan fits"):
        loop.replanning.at_root(loop.engine, loop.resources, loop.steps)


def test_gradients_seen_while_a_step_is_timed_give_one_plan_not_two():
    loop = Loop([plan_of(0.9), plan_of(0.8)])
    seen = iter([True])
    loop.planner.sees_gradients = lambda _: next(seen, False)
    loop.run(3)
    assert loop.used == [(2, "0.9 s")]
    assert loop.timed == [1, 3]


def test_graphs_that_are_kept_are_named_while_no_step_was_timed():
    loop = Loop([plan_of(0.9)])
    loop.engine.has_live_frames = True
    loop.run(3)
    assert not loop.timed
    assert any("detach what you keep" in note for note in loop.engine.notes)


def test_a_plan_in_the_middle_of_a_step_is_timed_in_a_whole_one():
    loop = Loop([plan_of(0.9), plan_of(0.8)], wants_times=False)
    loop.steps.begun = True
    loop.run(1)
    assert loop.used == [(1, "0.9 s")]
    assert loop.steps.first_of_plan == 2
    loop.steps.begun = False
    for _ in range(3):
        loop.steps.num_steps += 1
        loop.replanning.at_root(loop.engine, loop.resources, loop.steps)
    assert loop.timed == [3], "the first whole step rehearses"


def test_a_step_of_other_shapes_is_timed_again_but_not_for_ever():
    loop = Loop([plan_of(0.9), plan_of(0.8)])
    loop.steps.last_shapes = "(2,)"
    loop.run(2)
    assert loop.timed == [1, 2], "its times are not those of the traced step's bytes"
    loop.steps.last_shapes = "(4,)"
    loop.steps.num_steps += 1
    loop.replanning.at_root(loop.engine, loop.resources, loop.steps)
    assert loop.used == [(3, "0.9 s")]

    always_other = Loop([plan_of(0.9), plan_of(0.8)])
    always_other.steps.last_shapes = "(2,)"
    always_other.run(12)
    assert always_other.timed[:4] == [1, 2, 3, 4]
    assert [at for at, _ in always_other.used] == [5, 7]
