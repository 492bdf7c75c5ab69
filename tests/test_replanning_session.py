"""What CUDA sessions do after their traced step, in whole sessions on the CPU: a step is timed before a plan is made,
and the plan waits for its host memory. Planner, engine, clock, report are the real ones; only that the planner wants
times, and when memory is locked, is set."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import pytest
import torch

import memopt
from memopt._planning import Planner
from memopt._resources import Resources
from memopt.report import render_text
from tests.activations import test_over_budget as over_budget

WIDTH, NUM_BLOCKS, ROWS = 96, 6, 1024
build = partial(over_budget.build, WIDTH, NUM_BLOCKS)


@dataclass
class Machine:
    """When host memory is locked, counted in questions of the session."""

    locked_after: int = 0
    num_asked: int = 0
    locks: list[str] = field(default_factory=list)

    def lock(self, plan, trace) -> None:
        del trace
        self.locks.append(plan.solver)

    def is_locked(self, at_most_s: float) -> bool:
        del at_most_s
        self.num_asked += 1
        return self.num_asked > self.locked_after


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    wants = Planner.wants_times

    def wants_times(planner: Planner) -> bool:
        trace = planner.trace
        object.__setattr__(trace, "device", "cpu but slow")  # past the one question that says no
        try:
            return wants(planner)
        finally:
            object.__setattr__(trace, "device", "cpu")

    monkeypatch.setattr("memopt._planning.check_budget", fits_untouched)
    monkeypatch.setattr(Planner, "wants_times", wants_times)
    monkeypatch.setattr(Resources, "lock", lambda _, plan, trace: machine.lock(plan, trace))
    monkeypatch.setattr(Resources, "is_locked", lambda _, wait_s: machine.is_locked(wait_s))
    return machine


def fits_untouched(trace, hardware, **limits) -> bool:
    from memopt.plan import check_budget

    object.__setattr__(trace, "device", "cpu")
    return check_budget(trace, hardware, **limits)


@pytest.fixture(scope="module")
def budget():
    """Half of what the blocks keep."""
    states = 4 * sum(p.numel() for p in build()[0].parameters()) * 4
    kept = NUM_BLOCKS * ROWS * 4 * (4 + 4 + 1) * WIDTH
    return memopt.Budget(device=states + kept // 2)


def batches(num, rows=ROWS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, WIDTH, generator=generator) for _ in range(num)]


class Run:
    """A loop; each of its steps is the batches given. What it saw is kept."""

    def __init__(self, budget, *, with_optimizer=True, zero=True, num_micro=1, hook=None) -> None:
        self.budget = budget
        self.with_optimizer, self.zero, self.num_micro = with_optimizer, zero, num_micro
        self.hook = hook or (lambda *_: None)
        self.reports: list[memopt.RunReport] = []
        self.plans: list[memopt.Plan] = []

    def losses(self, num_steps: int) -> list[float]:
        model, regions = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01) if self.with_optimizer else None
        given = batches(num_steps * self.num_micro)
        if self.budget is None:
            return self.train(model, optimizer, given, num_steps, None)
        with memopt.optimize(model, optimizer, budget=self.budget, regions=regions) as run:
            found = self.train(model, optimizer, given, num_steps, run)
        self.report = run.report()
        self.session = run
        return found

    def train(self, model, optimizer, given, num_steps, run) -> list[float]:
        found = []
        for step in range(num_steps):
            for x in given[step::num_steps]:
                self.hook(step, model, run)
                loss = model(x).square().mean()
                loss.backward()
                found.append(loss.item())
            found.append(sum(p.grad.double().sum().item() for p in model.parameters()))
            if optimizer is not None:
                optimizer.step()
            if self.zero:
                model.zero_grad()
            if run is not None:
                self.reports.append(run.report())
                self.plans.append(run.plan)
        return found


LOOPS = {
    "plain": {},
    "no optimizer": {"with_optimizer": False},
    "accumulation": {"num_micro": 3},
    "gradients stay": {"zero": False},
    "gradients stay, no optimizer": {"zero": False, "with_optimizer": False},
}


@pytest.mark.parametrize("locked_after", [0, 3])
@pytest.mark.parametrize("loop", LOOPS)
def test_every_loop_is_exact_and_ends_in_its_plan(machine, budget, loop, locked_after):
    machine.locked_after = locked_after
    run = Run(budget, **LOOPS[loop])
    assert run.losses(9) == Run(None, **LOOPS[loop]).losses(9)
    report = run.report
    assert report.plan == "greedy"
    assert 1 <= report.num_planned_steps <= 7
    assert f"median of {report.num_planned_steps} planned" in render_text(report)
    assert not any("no plan yet" in n or "waits until" in n for n in report.notes)
    assert report.measured.device_bytes <= run.session.budget.device_bytes


def test_what_a_report_says_while_no_plan_is_in_force(machine, budget):
    machine.locked_after = 2
    run = Run(budget)
    run.losses(7)
    plans = [report.plan for report in run.reports]
    num_safe = plans.index("greedy")
    assert plans == ["first step"] * num_safe + ["greedy"] * (7 - num_safe)
    assert num_safe >= 3, "one is traced, one timed, one ran while memory was locked"
    for report in run.reports[:num_safe]:
        assert report.num_planned_steps == 0
        assert report.predicted.device_bytes > 0, "of the placement in force"
        assert {row.placement for row in report.placements} <= {"recompute", "device"}
        assert sum("no plan yet" in n or "waits until" in n for n in report.notes) == 1
    assert "no plan yet" in "".join(run.reports[0].notes)
    assert "page-locked" in "".join(run.reports[num_safe - 1].notes)
    assert run.reports[num_safe].num_planned_steps == 1


@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_loop_too_short_for_a_plan_says_so(machine, budget, num_steps):
    run = Run(budget)
    assert run.losses(num_steps) == Run(None).losses(num_steps)
    assert run.report.plan == "first step"
    assert run.report.num_planned_steps == 0
    assert "no plan yet" in "".join(run.report.notes)
    off = run.report.predicted.device_bytes / run.report.measured.device_bytes
    assert 0.9 < off < 1.1


def test_exceptions_and_evaluations_in_the_timed_step(machine, budget):
    failed = []

    def disturb(step, model, run):
        if step == 1 and not failed:
            handle = model[3].register_forward_pre_hook(lambda *_: 1 / 0)
            try:
                with pytest.raises(ZeroDivisionError):
                    model(batches(1)[0])
            finally:
                handle.remove()
            failed.append(step)
        if step == 2:
            model(batches(1)[0])  # gradients on, and no backward
        with torch.no_grad():
            model(batches(1)[0])

    run = Run(budget, hook=disturb)
    assert run.losses(9) == Run(None).losses(9)
    assert run.report.plan == "greedy"
    assert run.report.num_planned_steps >= 1


def test_graphs_that_are_always_kept_are_named(machine, budget):
    kept = []

    def keep(step, model, run):
        if run is not None:
            kept.append(model(batches(1)[0]).sum())

    run = Run(budget, hook=keep)
    assert run.losses(4) == Run(None).losses(4)
    assert run.report.plan == "first step"
    assert any("detach what you keep" in note for note in run.report.notes)


def test_a_short_batch_in_the_timed_step_is_no_example(machine, budget):
    """Its regions take a quarter of the time: a plan from that would hide a quarter of what it could."""
    model, regions = build()
    given = [x[: ROWS // 4] if i == 1 else x for i, x in enumerate(batches(8))]
    kinds = []
    with memopt.optimize(model, budget=budget, regions=regions) as run:
        for x in given:
            model(x).square().mean().backward()
            model.zero_grad()
            kinds.append((run._engine.plan.solver, run._replanning._num_timed))
    assert kinds[2] == ("first step", 0), "timed again"
    assert kinds[3] == ("greedy", 1)
