"""Which steps the report's median, and its writes per step, are of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memopt
from memopt._steps import Steps
from memopt.report import render_text
from tests.activations.test_clock import Hands


class Clock(Hands):
    """It tells no memory either."""

    def current_bytes(self) -> int:
        return 0

    peak = take_peak = current_bytes


class Loop:
    """Steps that take so many seconds, and write as many bytes to SSD."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.written = 0
        self.steps = Steps(self.clock, nn.Linear(2, 2), None, lambda: 0, lambda: self.written)

    def step(self, seconds: int, *, num_roots: int = 1, plan_at: int | None = None) -> None:
        for root in range(num_roots):
            if root == plan_at:
                self.steps.plan_begins()
            self.steps.begin_root((), {})
            self.steps.end_root()
        self.written += seconds
        self.clock.now_s += seconds
        self.steps.end_optimizer()
        self.steps.end_step()


def test_the_median_is_of_the_plan_in_force():
    loop = Loop()
    loop.step(9)
    for seconds in (5, 5, 5, 5):
        loop.step(seconds)
    loop.step(3, plan_at=0)
    loop.step(2)
    loop.step(2)
    assert loop.steps.step_times() == (9, 2, 3)
    assert loop.steps.step_writes() == 2
    loop.step(4, plan_at=0)
    assert loop.steps.step_times() == (9, 4, 1), "of the second plan alone"


def test_a_step_in_which_the_plan_changed_is_no_plans():
    loop = Loop()
    for seconds in (9, 5, 5):
        loop.step(seconds)
    loop.step(7, num_roots=4, plan_at=2)
    assert loop.steps.step_times() == (9, 5, 0), "of all but the first where there are none"
    assert loop.steps.step_writes() == 5
    loop.step(3, num_roots=4)
    assert loop.steps.step_times() == (9, 3, 1)


def test_before_and_after_one_step():
    loop = Loop()
    assert loop.steps.step_times() == (None, None, 0)
    loop.step(9)
    assert loop.steps.step_times() == (9, None, 0)
    assert loop.steps.step_writes() is None


@pytest.mark.parametrize("times_asked", [1, 400], ids=["asked at the end", "asked in every step"])
def test_long_runs(times_asked):
    loop = Loop()
    for i in range(600):
        loop.step(3 if i < 300 else 2, plan_at=0 if i in (1, 300) else None)
        if i >= 600 - times_asked:
            loop.steps.step_times()
    assert loop.steps.step_times() == (3, 2, 300)


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(4))
    )


def test_a_plan_that_came_late_is_reported_by_its_own_steps():
    """Graphs that the loop keeps put the plan off; those steps are not what was predicted."""
    model = blocks()
    kept = []
    with memopt.optimize(model, plan="recompute", regions=["0", "1", "2", "3"]) as run:
        for i in range(8):
            loss = model(torch.randn(4, 16)).sum()
            loss.backward(retain_graph=True)
            kept.append(loss if i < 3 else None)
            if i == 3:
                early = run.report()
                kept.clear()
            del loss
    assert early.num_planned_steps == 0
    assert early.plan == "first step", "which is what ran"
    assert early.predicted.device_bytes, "of it"
    assert "median, before the plan" in render_text(early)
    report = run.report()
    assert report.num_steps == 8
    assert report.num_planned_steps == 4
    assert report.plan == "uniform:recompute"
    assert "median of 4 planned steps" in render_text(report)
    assert any("detach what you keep" in note for note in report.notes)
