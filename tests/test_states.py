"""What a model's states take, and what the optimizer's first step will add to them: known before any op runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memopt
from memopt._states import measure_states, missing_optimizer_bytes


def build():
    return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(4)))


def matrices(model):
    return [p for p in model.parameters() if p.ndim == 2]


OPTIMIZERS = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters()),
    "adamw-foreach-amsgrad": lambda m: torch.optim.AdamW(
        m.parameters(), foreach=True, amsgrad=True
    ),
    "adamw-fused": lambda m: torch.optim.AdamW(m.parameters(), fused=True),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "sgd-momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "muon": lambda m: torch.optim.Muon(matrices(m)),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), momentum=0.9),
    "nadam": lambda m: torch.optim.NAdam(m.parameters()),
    "groups": lambda m: torch.optim.SGD(
        [{"params": m[0].parameters()}, {"params": m[1:].parameters(), "momentum": 0.9}], lr=0.1
    ),
}


def step(model, optimizer):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("frozen", [False, True])
def test_state_bytes_are_known_before_the_first_step(name, frozen):
    model = build()
    model[3].requires_grad_(not frozen)
    optimizer = OPTIMIZERS[name](model)
    stepped = []
    optimizer.register_step_pre_hook(lambda *_: stepped.append(1))
    generator = torch.get_rng_state()
    expected = missing_optimizer_bytes(optimizer)
    assert not stepped
    assert not optimizer.state
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in model.parameters())
    step(model, optimizer)
    assert expected == measure_states(model, optimizer).optimizer_bytes
    assert missing_optimizer_bytes(optimizer) == 0, "nothing is missing any more"


def test_a_schedulers_wrapper_is_not_called():
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = scheduler.state_dict()
    assert missing_optimizer_bytes(optimizer) == 2 * 4 * sum(
        p.numel() for p in model.parameters()
    ) + 4 * len(list(model.parameters()))
    assert scheduler.state_dict() == before
    assert not getattr(optimizer, "_opt_called", False)


@pytest.mark.parametrize("name", ["Adafactor", "LBFGS"])
def test_what_cannot_be_told_counts_nothing(name):
    model = build()
    assert missing_optimizer_bytes(getattr(torch.optim, name)(model.parameters())) == 0
    assert missing_optimizer_bytes(None) == 0


@pytest.mark.parametrize(("adam", "refused"), [(True, True), (False, False)])
def test_a_budget_below_the_coming_states_is_refused_at_entry(adam, refused):
    model = build()
    param_bytes = 4 * sum(p.numel() for p in model.parameters())
    optimizer = (
        torch.optim.AdamW(model.parameters()) if adam else torch.optim.SGD(model.parameters(), 0.1)
    )
    budget = memopt.Budget(
        device=3 * param_bytes
    )  # parameters and gradients fit, AdamW's state not
    session = memopt.Session(model, optimizer, memopt.session.Settings(budget=budget))
    if not refused:
        session.start()
        session.stop()
        return
    with pytest.raises(memopt.BudgetError) as caught:
        session.start()
    states = 2 * param_bytes + 4 * len(list(model.parameters()))
    assert f"optimizer state {states:,}" in str(caught.value)
    assert f"above {2 * param_bytes + states:,} bytes" in str(caught.value)
    assert all("forward" not in vars(m) for m in model.modules())
