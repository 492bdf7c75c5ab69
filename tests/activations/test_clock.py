"""The region clock: what it calls forward, rerun and backward, on a clock that the test moves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memopt
from memopt._planning import Planner
from memopt.activations.clock import RegionClock


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


@pytest.mark.parametrize("with_optimizer", [True, False])
@pytest.mark.parametrize("num_micro", [1, 2])
def test_two_steps_are_timed_whole(monkeypatch, with_optimizer, num_micro):
    seen = []
    real = Planner.calibrate

    def calibrate(self, plan, step_s, exposed_s, times):
        seen.append((step_s, times))
        real(self, plan, step_s, exposed_s, times)

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
        assert run.plan.predicted is not None
    assert len(seen) == 2
    step_s, times = seen[1]
    # without an optimizer nothing says when the first region's backward ended
    assert set(times) == set(named if with_optimizer else named[1:])
    assert sum(t.total_s for t in times.values()) * (num_micro if with_optimizer else 1) > 0.0
    assert sum(t.forward_s for t in times.values()) < step_s
