"""The region clock: what it calls forward, rerun and backward, on a clock that the test moves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import memopt
from memopt._planning import Planner
from memopt.activations.clock import LEAST_COPIED_BYTES, MAX_CALLS, RegionClock
from memopt.memory.meter import CpuMeter
from memopt.types.plan import Plan, Prediction, RegionPlan


class Hands:
    """A meter whose clock moves only when told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def mark(self) -> float:
        return self.now_s

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def pass_s(self, seconds: float) -> None:
        self.now_s += seconds


def test_phases_without_their_waits():
    hands = Hands()
    clock = RegionClock(hands)
    for name, seconds in (("a", 2.0), ("b", 3.0)):
        clock.forward_begins(name)
        hands.pass_s(seconds)
        clock.waited(hands.now_s - 0.5, hands.now_s)
        clock.forward_ends()
        hands.pass_s(100.0)  # between regions
    clock.waited(0.0, 50.0)  # outside any region
    for name, rerun, back in (("b", 4.0, 10.0), ("a", 5.0, 20.0)):
        clock.recompute_begins(name)
        hands.pass_s(rerun)
        clock.waited(hands.now_s - 1.0, hands.now_s)
        clock.recompute_ends(name)
        hands.pass_s(back)
    clock.backward_ends()
    times = clock.times()
    assert [times[n].forward_s for n in "ab"] == [1.5, 2.5]
    assert [times[n].rerun_s for n in "ab"] == [4.0, 3.0]
    assert [times[n].backward_s for n in "ab"] == [20.0, 10.0]
    assert clock.waited_s() == 53.0, "outside regions, too"
    assert clock.num_micro_batches == 1
    assert clock.is_whole


def test_what_was_not_seen_whole_is_left_out():
    hands = Hands()
    clock = RegionClock(hands)
    for name in ("a", "b", "c"):
        clock.forward_begins(name)
        hands.pass_s(1.0)
        clock.forward_ends()
    clock.recompute_begins("c")
    clock.recompute_ends("c")
    hands.pass_s(7.0)
    clock.recompute_begins("b")  # an exception ended backward here
    assert set(clock.times()) == {"c"}
    assert not clock.is_whole
    assert clock.num_micro_batches == 1
    assert clock.times()["c"].backward_s == 7.0


def test_calls_of_one_name_give_their_median():
    hands = Hands()
    clock = RegionClock(hands)
    for seconds in (1.0, 2.0, 9.0):
        clock.forward_begins("a")
        hands.pass_s(seconds)
        clock.forward_ends()
        clock.recompute_begins("a")
        clock.recompute_ends("a")
        clock.backward_ends()
    assert clock.times()["a"].forward_s == 2.0


def test_rates_of_the_link_need_enough_bytes():
    clock = RegionClock(Hands())
    for _ in range(4):
        clock.copied("d2h", LEAST_COPIED_BYTES // 4, 1.0, 1.5)
    clock.copied("h2d", LEAST_COPIED_BYTES - 1, 0.0, 1.0)
    assert clock.link_bytes_per_s("d2h") == LEAST_COPIED_BYTES / 2.0
    assert clock.link_bytes_per_s("h2d") is None
    for _ in range(MAX_CALLS):
        clock.copied("h2d", 1, 0.0, 1.0)
    assert clock.is_full
    assert clock.link_bytes_per_s("d2h") is None


@pytest.mark.parametrize("with_optimizer", [True, False])
@pytest.mark.parametrize("num_micro", [1, 2])
def test_two_steps_are_timed_whole(monkeypatch, with_optimizer, num_micro):
    seen = []
    real = Planner.calibrate

    def calibrate(self, plan, step_s, clock):
        seen.append((step_s, clock.times()))
        return real(self, plan, step_s, clock)

    monkeypatch.setattr(Planner, "calibrate", calibrate)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4))
    model = nn.Sequential(nn.Linear(64, 64), *blocks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if with_optimizer else None
    named = [f"{i}" for i in range(1, 5)]
    with memopt.optimize(model, optimizer, plan="recompute", regions=named) as run:
        for _ in range(6):
            for _ in range(num_micro if with_optimizer else 1):
                model(torch.ones(256, 64)).sum().backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
        assert run._engine.clock is None
        assert run._engine.transfers.moved.on_wait is None
        assert run._engine.transfers.moved.on_copy is None
        assert run.plan.predicted is not None
    assert len(seen) == 2
    step_s, times = seen[1]
    # without an optimizer nothing says when the first region's backward ended
    assert set(times) == set(named if with_optimizer else named[1:])
    assert sum(t.total_s for t in times.values()) * (num_micro if with_optimizer else 1) > 0.0
    assert sum(t.forward_s for t in times.values()) < step_s


def test_a_call_inside_another_ones_forward_is_no_crash():
    clock = RegionClock(Hands())
    clock.forward_begins("a")
    clock.forward_begins("b")  # a module that holds another region where no one sees it
    clock.forward_ends()
    clock.forward_ends()
    for name in "ab":
        clock.recompute_begins(name)
        clock.recompute_ends(name)
    clock.backward_ends()
    assert set(clock.times()) == {"b"}


def test_a_step_that_never_ends_is_not_marked_for_ever():
    clock = RegionClock(Hands())
    for _ in range(MAX_CALLS + 100):
        clock.forward_begins("a")
        clock.waited(0.0, 1.0)
        clock.forward_ends()
    assert clock.is_full
    assert sum(map(len, clock._calls.values())) <= 1
    assert clock.waited_s() == 0.0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.failing:
            raise FloatingPointError("as asked")
        return x + self.b(nn.functional.gelu(self.a(x)))

    failing = False


class Stack(nn.Module):
    def __init__(self, num_blocks: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


def untouched(*numbers: int) -> Plan:
    return Plan(regions=tuple(RegionPlan(name=f"blocks.{i}", plain=i in numbers) for i in range(6)))


@pytest.fixture
def bytes_for_seconds(monkeypatch):
    """A clock that goes on by what is allocated: a machine without noise."""
    monkeypatch.setattr(CpuMeter, "mark", lambda self: self.accounted.born_bytes / 1e9)


LOOPS = {
    "recompute": {},
    "untouched": {"plan": "device"},
    "one at the end runs again": {"plan": untouched(0, 1, 2, 3, 4)},
    "one in the middle runs again": {"plan": untouched(0, 1, 3, 4, 5)},
    "the first run untouched": {"plan": untouched(0, 1, 2)},
    "first step of one micro-batch": {"num_micro": lambda step: 4 if step else 1},
    "later steps of one micro-batch": {"num_micro": lambda step: 1 if step else 4},
    "one timed step of fewer": {"num_micro": lambda step: 1 if step == 3 else 4},
    "work between backward and step": {"between": 40},
    "evaluation with gradients": {"evaluated": (2, 3)},
    "an exception": {"fails": (2, 3)},
    "without an optimizer": {"with_optimizer": False},
}


@pytest.mark.usefixtures("bytes_for_seconds")
@pytest.mark.parametrize("loop", LOOPS)
def test_what_is_predicted_is_what_the_loop_takes(loop):
    assert run_loop(**LOOPS[loop]) == pytest.approx(1.0, abs=0.03)


def run_loop(
    *, plan="recompute", num_micro=lambda step: 1, between=0, evaluated=(), fails=(), with_optimizer=True
):  # fmt: skip
    """Return the predicted time of a step over the median of those measured."""
    model, x = Stack(), torch.ones(256, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if with_optimizer else None
    with memopt.optimize(model, optimizer, plan=plan) as run:
        for step in range(12):
            if step in evaluated:
                for _ in range(20):
                    model(x)
            if step in fails:
                model.blocks[3].failing = True
                with pytest.raises(FloatingPointError):
                    model(x)
                torch.ones(20_000_000)  # what the program does about it takes long
                model.blocks[3].failing = False
            for _ in range(num_micro(step)):
                model(x).sum().backward()
            for _ in range(between):
                torch.ones(256, 64)
            if optimizer is not None:
                optimizer.step()
            model.zero_grad()
    report = run.report()
    return report.predicted.step_s / report.measured.step_s


@pytest.mark.usefixtures("bytes_for_seconds")
def test_a_step_is_measured_by_itself_where_graphs_still_live(monkeypatch):
    seen = []
    real = Planner.calibrate

    def calibrate(self, plan, step_s, clock):
        seen.append((step_s, clock.num_micro_batches))
        return real(self, plan, step_s, clock)

    monkeypatch.setattr(Planner, "calibrate", calibrate)
    model, x = Stack(), torch.ones(256, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = []
    with memopt.optimize(model, optimizer, plan="recompute"):
        for step in range(14):
            if 2 <= step < 8:
                held.append(model(x))  # alive at the next root forwards
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 8:
                held.clear()
    assert len(seen) == 2
    assert all(num_micro == 1 for _, num_micro in seen)


def test_the_clock_stops_with_the_session():
    model = Stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with memopt.optimize(model, optimizer, plan="recompute") as run:
        for _ in range(2):
            model(torch.ones(256, 64)).sum().backward()
            optimizer.step()
        loss = model(torch.ones(256, 64)).sum()
        assert run._engine.clock is not None
    assert run._engine.clock is None
    assert run._engine.transfers.moved.on_wait is None
    loss.backward()


def test_a_plan_that_waits_for_an_old_graph_says_so():
    model, x = Stack(), torch.ones(256, 64)
    held = []
    with memopt.optimize(model, plan="recompute") as run:
        for _ in range(3):
            loss = model(x).sum()
            loss.backward()
        assert not any("still alive" in note for note in run.report().notes)
    with memopt.optimize(model, plan="recompute") as run:
        for _ in range(3):
            held.append(model(x).sum())
            model(x).sum().backward()
        assert any("detach what you keep" in note for note in run.report().notes)


@pytest.mark.gpu
def test_copies_beside_compute_tell_the_rate_of_the_link(monkeypatch):
    rates = []
    real = Planner.calibrate

    def calibrate(self, plan, step_s, clock):
        rates.append((clock.link_bytes_per_s("d2h"), clock.link_bytes_per_s("h2d")))
        return real(self, plan, step_s, clock)

    monkeypatch.setattr(Planner, "calibrate", calibrate)
    model = Stack().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with memopt.optimize(model, optimizer, plan="host") as run:
        for _ in range(6):
            model(torch.ones(1 << 16, 64, device="cuda")).sum().backward()  # 16 and 32 MiB outputs
            optimizer.step()
            optimizer.zero_grad()
        probed = run._replanning.planner._hardware
    assert len(rates) >= 2
    for rate in rates[0]:
        assert 5e9 < rate < 1e11
    assert "copies showed" in probed.source


def test_peaks_of_a_run_are_compared_with_the_largest_that_its_plans_predicted():
    """A later plan may need less: the peak of the whole run is no fault of its prediction."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)))
    with memopt.optimize(model, plan="recompute", regions=["0", "1", "2", "3"]) as run:
        for _ in range(5):
            model(torch.ones(256, 64)).sum().backward()
        first = run.plan.predicted
        later = Prediction(device_bytes=first.device_bytes - 1, ssd_bytes=5, step_s=7.0)
        run._engine.use(replace(run.plan, predicted=later))
    predicted = run.report().predicted
    assert predicted.device_bytes == first.device_bytes > 0
    assert (predicted.ssd_bytes, predicted.step_s) == (5, 7.0)
