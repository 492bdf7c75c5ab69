"""When a session plans again: after the first timed step, and after the second where it pays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from memopt._replanning import Replanning
from memopt.types.plan import Plan, Prediction


def plan_of(name: str, step_s: float) -> Plan:
    predicted = Prediction(
        device_bytes=1, host_bytes=0, ssd_bytes=0, step_s=step_s, exposed_s=0.0, d2h_bytes=0
    )
    return Plan(solver=name, predicted=predicted)


class Planner:
    """Gives the plans it is told, and predicts of any plan what it is told."""

    def __init__(self, plans: list[Plan], now_s: float) -> None:
        self.plans, self.now_s, self.num_calibrated = plans, now_s, 0
        self.trace = None

    def plan(self) -> Plan:
        return self.plans.pop(0)

    def with_prediction(self, plan: Plan) -> Plan:
        return plan_of(plan.solver, self.now_s)

    def sees_gradients(self, grad_bytes: int) -> bool:
        return False

    def sees_peak(self, plan: Plan, peak_bytes: int) -> bool:
        return False

    def calibrate(self, plan: Plan, step_s: float, clock: Any) -> None:
        self.num_calibrated += 1


class Engine:
    """Notes which plans ran."""

    has_live_frames = False

    def __init__(self) -> None:
        self.plan, self.ran, self.clock, self.notes = Plan(), [], None, {}

    def use(self, plan: Plan) -> None:
        self.plan = plan
        if not self.ran or self.ran[-1] != plan.solver:
            self.ran.append(plan.solver)

    def time_regions(self, clock: Any) -> None:
        self.clock = clock and SimpleNamespace(is_whole=True, is_full=False)


@pytest.mark.parametrize(
    ("third_s", "ran", "num_timed"),
    [
        (
            0.98,
            ["first", "second", "third"],
            3,
        ),  # the second step's times show that more can be hidden
        (0.998, ["first", "second"], 2),  # not worth the first step of a plan
        (1.2, ["first", "second"], 2),
    ],
)
def test_a_third_plan_where_it_pays(third_s, ran, num_timed):
    planner = Planner(
        [plan_of("first", 2.0), plan_of("second", 1.5), plan_of("third", third_s)], 1.0
    )
    engine, replanning = Engine(), Replanning()
    resources = SimpleNamespace(prepare=lambda *_: None, is_locking=False, meter=None)
    replanning.begin(planner)
    for step in range(1, 14):
        steps: Any = SimpleNamespace(
            num_steps=step,
            begun=False,
            grad_bytes=lambda: 0,
            last_step_s=lambda: 1.0,
            last_step_peak_bytes=0,
        )
        replanning.at_root(engine, resources, steps)
    assert engine.ran == ran
    assert planner.num_calibrated == num_timed
    assert engine.plan.predicted.step_s == 1.0, "what was corrected, not what was hoped for"
    assert engine.clock is None
