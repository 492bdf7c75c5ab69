"""Device bytes: what is predicted of a plan beside what a run of it holds, family by family.

On the CPU accounted bytes are exact, so whatever differs is the cost model's. A prediction that is too low breaks the
budget, one that is too high wastes it: the bounds are `TOO_LOW` (less than the 1 % of a CPU budget that plans leave
free) and `TOO_HIGH` of what was measured, with two exceptions upwards. docs/plan.md says them too.
"""

from __future__ import annotations

import random

import pytest
import torch
from _families import FAMILIES

import memopt
from memopt.plan import predict_plain, smallest_budget
from memopt.plan.cost import CPU_SLACK, assumed_hardware
from memopt.types.plan import OpPlacement, Plan, RegionPlan

TOO_LOW, TOO_HIGH = 0.008, 0.03
SHARED_TOO_HIGH = 0.04
"""T5: what many blocks share is counted from its second user on, and as the program's own before that."""
MIXED_TOO_HIGH = 0.12
"""Outputs stored at random: their first step may rehearse a recompute with all of them there, which counts whole."""
FAST = ("llama", "gpt2", "gru", "cnn", "resnet", "autocast")
CPU = assumed_hardware("cpu")
EVERY = [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in FAMILIES]


def train(family, *, steps=3, adam=False, micro_batches=1, **options):
    """Run some steps; return the session, stopped."""
    torch.manual_seed(0)
    build, loss_of = FAMILIES[family]
    model = build().train()
    kind = torch.optim.AdamW if adam else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=1e-3, foreach=False)
    with memopt.optimize(model, optimizer, **options) as run:
        for _ in range(steps):
            for _ in range(micro_batches):
                loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
    return run


def error_of(run):
    """Return (predicted - measured) / measured of the whole run's peak."""
    report = run.report().to_dict()
    measured = report["measured"]["device_bytes"]
    return (report["predicted"]["device_bytes"] - measured) / measured


def close(run, most=TOO_HIGH):
    error = error_of(run)
    assert -TOO_LOW <= error <= most, f"{100 * error:+.2f} %"


def mixed(trace, seed, *, untouched=0.0):
    """Any outputs on the device, useful or not, in a different share of each region."""
    draw = random.Random(seed)
    regions = []
    for region in trace.regions:
        plain, share = draw.random() < untouched, draw.choice([0.2, 0.5, 0.8])
        ops = tuple(
            OpPlacement(position=op.position, op=op.op, placement="device", nbytes=op.nbytes)
            for op in region.ops
            if op.placeable and op.nbytes and draw.random() < share
        )
        regions.append(RegionPlan(name=region.name, plain=plain, ops=() if plain else ops))
    return Plan(regions=tuple(regions))


@pytest.mark.parametrize("family", EVERY)
def test_every_kind_of_plan(family):
    most = SHARED_TOO_HIGH if family == "t5" else TOO_HIGH
    run = train(family, plan="recompute", steps=2)
    close(run, most)
    trace = run.trace
    close(train(family, plan="device", steps=2), most)
    close(train(family, plan=mixed(trace, 0)), MIXED_TOO_HIGH)
    # T5's blocks share one cache: once an untouched one filled it, the others run untouched too
    plan = mixed(trace, 1, untouched=0.0 if family == "t5" else 0.5)
    close(train(family, plan=plan), MIXED_TOO_HIGH)


@pytest.mark.parametrize("family", EVERY)
def test_budgets_are_kept_and_used(family):
    trace = train(family, plan="recompute", steps=2).trace
    least, plain = smallest_budget(trace, CPU), predict_plain(trace)
    # Mixtral's dry run fails on its experts, and what is left of it counts in the first step of a tight budget
    for share in (0.1 if family == "mixtral" else 0.0, 0.4):
        budget = int(least + share * (plain / (1 - CPU_SLACK) - least))
        run = train(family, budget=memopt.Budget(device=budget), steps=4)
        close(run, SHARED_TOO_HIGH if family == "t5" else TOO_HIGH)
        assert run.report().to_dict()["measured"]["device_bytes"] <= budget
        assert not any("more than planned" in note for note in run.report().notes)


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_optimizer_state_and_gradients_that_stay(family):
    close(train(family, plan="recompute", adam=True))
    close(train(family, plan="recompute", micro_batches=2))
    plan = mixed(train(family, plan="recompute", steps=1).trace, 2)
    close(train(family, plan=plan, adam=True, micro_batches=2), MIXED_TOO_HIGH)
