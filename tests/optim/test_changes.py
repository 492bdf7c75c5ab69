"""What users do to groups and state between steps: it means what it means with torch's optimizers."""

from __future__ import annotations

import copy
from collections import defaultdict

import pytest
import torch
from torch import nn

from memopt.optim import Frugal, frugal_groups
from tests.optim.test_hard_use import pair
from tests.optim.test_optimizer_contract import SELECTIONS, make, same, train


def give_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


# ------------------------------------------------------------------------- groups
def test_a_group_after_a_removed_one_has_its_own_settings_and_state():
    torch.manual_seed(0)
    first, second, third = (nn.Parameter(torch.randn(6, 6)) for _ in range(3))
    groups = [{"params": [first]}, {"params": [second], "lr": 7.0, "split": False}]
    optimizer = Frugal(groups, lr=0.1, density=0.5)
    for step in range(3):
        give_grads([first, second], step)
        optimizer.step()
    optimizer.param_groups.pop()
    optimizer.add_param_group({"params": [third], "lr": 1e-3, "split": False})
    assert second not in optimizer.state
    start = nn.Parameter(third.detach().clone())
    adamw = torch.optim.AdamW([start], lr=1e-3, weight_decay=0.0, foreach=True)
    for step in range(3):
        give_grads([first, third], step)
        start.grad = third.grad.clone()
        optimizer.step()
        adamw.step()
        assert torch.equal(start, third)


def test_a_parameter_that_moves_to_another_group_begins_anew():
    """Slices of an arena are no one parameter's: in another group they would be others' moments."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(6, 6)) for _ in range(2)]
    optimizer = Frugal(weights, lr=0.1, density=0.5)
    give_grads(weights, 0)
    optimizer.step()
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": weights, "density": 0.5, "lr": 0.1})
    others = [nn.Parameter(p.detach().clone()) for p in weights]
    fresh = Frugal(others, lr=0.1, density=0.5)
    for step in range(3):
        give_grads(weights, step)
        give_grads(others, step)
        optimizer.step()
        fresh.step()
        assert same(weights, others)


def test_groups_replaced_by_copies_go_on():
    (params, optimizer), (others, plain) = pair()
    for step in range(8):
        optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
        for side in (optimizer, plain):
            side.param_groups[0]["lr"] = 1e-2 * (1 + step)
        train(params, optimizer, [step])
        train(others, plain, [step])
        assert same(params, others)


def test_several_optimizers_from_the_same_groups():
    model = nn.Sequential(*[nn.TransformerEncoderLayer(8, 2, 8) for _ in range(2)])
    groups = frugal_groups(model)
    expected = groups.state_bytes()
    first = Frugal(groups, lr=1.0)
    second = Frugal(groups, lr=0.5)
    assert [g["lr"] for g in first.param_groups] == [1.0, 1.0]
    assert [g["lr"] for g in second.param_groups] == [0.5, 0.5]
    assert groups.state_bytes() == expected
    assert first.param_groups[0] is not second.param_groups[0]


# ------------------------------------------------------------------------- state
@pytest.mark.parametrize("way", ["clear", "replace", "delete"])
@pytest.mark.parametrize("rounding", ["nearest", "kahan"])
@pytest.mark.parametrize("selection", ["coordinates", "columns", "blocks", "svd"])
def test_deleted_state_begins_anew(selection, rounding, way):
    """In the middle of a gap: the choice stays, moments and counters are those of a new state."""
    settings = {"selection": selection, "rounding": rounding, "update_gap": 4}
    params, optimizer = make(torch.bfloat16, **settings)
    others, fresh = make(torch.bfloat16, **settings)
    train(params, optimizer, range(6), torch.bfloat16)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    if way == "clear":
        optimizer.state.clear()
    elif way == "replace":
        optimizer.state = defaultdict(dict)
    else:
        for p in params:
            del optimizer.state[p]
    # A new optimizer in the same round; a subspace is chosen anew in the next step by both.
    clock = {"calls": 6, "round": 1, "last_switch": 4, "active_density": 0.3}
    fresh.param_groups[0].update(clock)
    train(params, optimizer, range(6, 8), torch.bfloat16)
    train(others, fresh, range(6, 8), torch.bfloat16)
    assert same(params, others)
    assert {optimizer.state[p]["step"] for p in params} == {2}
    train(params, optimizer, range(8, 11), torch.bfloat16)
    train(others, fresh, range(8, 11), torch.bfloat16)
    assert same(params, others)


def test_deleting_one_parameters_state_leaves_the_others():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(5, 5)) for _ in range(3)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    frugal = Frugal([{"params": ours, "split": False}], lr=1e-2)
    adamw = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.0, foreach=True)
    for step in range(6):
        give_grads(ours, step)
        give_grads(theirs, step)
        if step == 3:
            del frugal.state[ours[1]]
            del adamw.state[theirs[1]]
        frugal.step()
        adamw.step()
        assert same(ours, theirs)


@pytest.mark.parametrize("on_switch", ["reset", "project"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_thawing_keeps_subspaces_and_moments(selection, on_switch):
    """In the middle of a gap, where the thawed parameter takes nothing from the others' budget."""
    settings = {"selection": selection, "on_switch": on_switch, "update_gap": 5}
    (params, optimizer), (others, plain) = pair(**settings)
    late = nn.Parameter(torch.ones(1, 1))  # floor(0.3 * 1) = 0 numbers of state
    late.requires_grad_(False)
    for side in (optimizer, plain):
        side.param_groups[0]["params"].append(nn.Parameter(late.clone()))
        side.param_groups[0]["param_names"].append("late")
        side.param_groups[0]["params"][-1].requires_grad_(False)
    train(params, optimizer, range(8))
    train(others, plain, range(8))
    thawed = optimizer.param_groups[0]["params"][-1].requires_grad_(True)
    thawed.grad = torch.ones(1, 1)
    steps = [optimizer.state[p]["step"] for p in params]
    train(params, optimizer, range(8, 10))
    train(others, plain, range(8, 10))
    assert [optimizer.state[p]["step"] for p in params] == [step + 2 for step in steps]
    assert same(params, others)
    assert bool((thawed < 1.0).all())


# ------------------------------------------------------------------------- loading
def test_a_loaded_learning_rate_is_a_tensor_of_its_own():
    params, optimizer = make(lr=torch.tensor(0.1))
    train(params, optimizer, range(2))
    _, other = make()
    other.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"].fill_(7.0)
    assert float(other.param_groups[0]["lr"]) == pytest.approx(0.1)


def test_numbers_that_came_back_as_tensors():
    """Checkpoint libraries make tensors of them."""
    (params, optimizer), (others, resumed) = pair(selection="svd")
    train(params, optimizer, range(5))
    saved = copy.deepcopy(optimizer.state_dict())
    for values in saved["state"].values():
        for name, value in values.items():
            if isinstance(value, int):
                values[name] = torch.tensor(value)
    resumed.load_state_dict(saved)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    train(params, optimizer, range(5, 9))
    train(others, resumed, range(5, 9))
    assert same(params, others)
