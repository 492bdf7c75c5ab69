"""Frugal as a torch.optim.Optimizer: groups, schedulers, closures, partial steps, saving, copying."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from memopt.optim import Frugal, presets

SELECTIONS = ["blocks", "columns", "rows", "coordinates", "svd", "random", "randperm"]
SHAPES = [(24, 20), (16, 40), (30,), (4, 3, 5), (7, 7)]


def make(dtype=torch.float32, seed=0, **settings):
    torch.manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    named = [(f"layer{i}", p) for i, p in enumerate(params)]
    settings = {"lr": 1e-2, "update_gap": 3, "density": 0.3, "weight_decay": 0.1, **settings}
    return params, Frugal(named, **settings)


def grads_of(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def train(params, optimizer, steps, dtype=torch.float32):
    for step in steps:
        for p, g in zip(params, grads_of(step, dtype), strict=True):
            p.grad = g.clone()
        optimizer.step()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("dtype", "settings"), [
    *[(dtype, settings) for dtype in (torch.float32, torch.bfloat16) for settings in (
        {}, {"on_switch": "project"}, {"quantize": "8bit"},
        {"rounding": "stochastic", "quantize": "8bit"},
    )],
    (torch.bfloat16, {"rounding": "kahan"}),
])  # fmt: skip
@pytest.mark.parametrize("selection", SELECTIONS)
def test_round_trip_in_the_middle_of_a_gap_is_bitwise(selection, dtype, settings):
    params, optimizer = make(dtype, selection=selection, **settings)
    train(params, optimizer, range(5), dtype)  # calls 0..4: inside the second round
    file = io.BytesIO()
    torch.save({"w": [p.detach().clone() for p in params], "o": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others, resumed = make(dtype, seed=9, selection=selection, lr=5.0, update_gap=77, **settings)
    for p, w in zip(others, saved["w"], strict=True):
        p.data.copy_(w)
    resumed.load_state_dict(saved["o"])
    assert resumed.param_groups[0]["lr"] == 1e-2
    for steps in (range(5, 6), range(6, 12)):
        train(params, optimizer, steps, dtype)
        train(others, resumed, steps, dtype)
        assert same(params, others)


def test_loading_does_not_cast():
    params, optimizer = make(torch.bfloat16, quantize="8bit")
    train(params, optimizer, range(2), torch.bfloat16)
    optimizer.state[params[0]]["step"] = 20_000_001
    saved = copy.deepcopy(optimizer.state_dict())
    others, resumed = make(torch.bfloat16, quantize="8bit")
    resumed.load_state_dict(saved)
    for p, q in zip(params, others, strict=True):
        before, after = optimizer.state[p], resumed.state[q]
        assert before.keys() == after.keys()
        for key, value in before.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == after[key].dtype
                assert torch.equal(value, after[key])
    assert resumed.state[others[0]]["exp_avg"].dtype == torch.uint8
    assert resumed.state[others[0]]["exp_avg_scale"].dtype == torch.float32
    assert resumed.state[others[0]]["step"] == 20_000_001


def test_loading_copies():
    params, optimizer = make()
    train(params, optimizer, range(2))
    others, resumed = make()
    resumed.load_state_dict(optimizer.state_dict())
    before = {k: v.clone() for k, v in optimizer.state[params[0]].items() if k != "step"}
    train(others, resumed, range(2, 4))
    assert all(torch.equal(v, optimizer.state[params[0]][k]) for k, v in before.items())


def test_state_has_fixed_keys_and_shapes_over_switches():
    for selection in SELECTIONS:
        params, optimizer = make(selection=selection)
        seen = set()
        for step in range(9):
            train(params, optimizer, [step])
            seen.add(str([
                {k: getattr(v, "shape", None) for k, v in optimizer.state[p].items()} for p in params
            ]))  # fmt: skip
        assert len(seen) == 1


def test_state_dict_holds_plain_values_only():
    _, optimizer = make()
    params, optimizer = make()
    train(params, optimizer, range(2))
    allowed = (torch.Tensor, int, float, bool, str, type(None), tuple, list)
    state = optimizer.state_dict()
    for values in state["state"].values():
        assert all(isinstance(value, (torch.Tensor, int, float)) for value in values.values())
    for group in state["param_groups"]:
        assert all(isinstance(value, allowed) for value in group.values())


@pytest.mark.parametrize("selection", SELECTIONS)
def test_deepcopy_and_pickle(selection):
    params, optimizer = make(selection=selection)
    train(params, optimizer, range(5))
    other_params, other = copy.deepcopy((params, optimizer))
    train(params, optimizer, range(5, 9))
    train(other_params, other, range(5, 9))
    assert same(params, other_params)
    file = io.BytesIO()
    torch.save((params, optimizer), file)
    file.seek(0)
    loaded_params, loaded = torch.load(file, weights_only=False)
    train(params, optimizer, range(9, 13))
    train(loaded_params, loaded, range(9, 13))
    assert same(params, loaded_params)


def test_a_state_of_another_shape_is_refused():
    params, optimizer = make(density=0.3)
    train(params, optimizer, range(2))
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group.update(density=0.5, arena_density=0.5)
    _, resumed = make(density=0.5)
    with pytest.raises(ValueError, match="same density"):
        resumed.load_state_dict(state)
    adamw = torch.optim.AdamW(params)
    with pytest.raises(ValueError, match="not one of Frugal"):
        resumed.load_state_dict(adamw.state_dict())


# ------------------------------------------------------------------------- partial steps
@pytest.mark.parametrize("impl", ["foreach", "reference"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_partial_steps_are_one_step(selection, impl):
    params, optimizer = make(selection=selection, impl=impl)
    others, split = make(selection=selection, impl=impl)
    for step in range(10):
        train(params, optimizer, [step])
        for p, g in zip(others, grads_of(step), strict=True):
            p.grad = g
        order = [3, 0, 1, 4, 2] if step % 2 else [0, 1, 2, 3, 4]
        cut = step % 4
        for i in order[:cut]:  # block by block, as in backward; gradients are freed at once
            split.step_partial([others[i]])
            if step % 3:
                others[i].grad = None
        split.step()
        assert same(params, others)
    assert split.param_groups[0]["calls"] == 10
    assert split.param_groups[0]["round"] == 3


def test_partial_steps_alone_count_once_closed():
    params, optimizer = make()
    for step in range(4):
        for p, g in zip(params, grads_of(step), strict=True):
            p.grad = g
        for p in params:
            optimizer.step_partial([p])
            p.grad = None
        optimizer.step()
    assert optimizer.param_groups[0]["calls"] == 4


def test_partial_step_refusals():
    params, optimizer = make()
    with pytest.raises(ValueError, match="does not have"):
        optimizer.step_partial([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="without a gradient"):
        optimizer.step_partial([params[0]])
    params[0].grad = torch.ones_like(params[0])
    optimizer.step_partial([params[0]])
    with pytest.raises(ValueError, match="once in a step"):
        optimizer.step_partial([params[0]])
    with pytest.raises(RuntimeError, match="partial step is open"):
        optimizer.state_dict()
    optimizer.step()
    optimizer.state_dict()


# ------------------------------------------------------------------------- the clock
def test_steps_without_a_gradient_do_not_count():
    params, optimizer = make()
    optimizer.step()
    train(params, optimizer, range(2))
    for p in params:
        p.grad = None
    optimizer.step()
    assert optimizer.param_groups[0]["calls"] == 2


def test_each_group_has_its_own_clock_and_settings():
    torch.manual_seed(0)
    a, b = (torch.nn.Parameter(torch.randn(8, 8)) for _ in range(2))
    optimizer = Frugal(
        [{"params": [a], "update_gap": 2, "selection": "rows"}, {"params": [b], "density": 0.5}],
        lr=1e-2, update_gap=5,
    )  # fmt: skip
    for step in range(6):
        a.grad = torch.randn(8, 8)
        b.grad = torch.randn(8, 8) if step % 2 else None
        optimizer.step()
    first, second = optimizer.param_groups
    assert (first["calls"], first["round"]) == (6, 2)
    assert (second["calls"], second["round"]) == (3, 0)
    assert optimizer.state_full_mask(a).sum() == 2 * 8
    assert optimizer.state_full_mask(b).sum() == 4 * 8


@pytest.mark.parametrize("settings", [
    {}, {"selection": "svd"}, {"state_full": "lion", "quantize": "8bit"},
    {"selection": "svd", "state_full": presets.fira.__name__, "state_free": "none"},
])  # fmt: skip
def test_probing_step_neither_allocates_nor_counts(settings):
    params, optimizer = make(**settings)
    before = [p.detach().clone() for p in params]
    lr = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = 0.0
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step(closure=None)
    optimizer.param_groups[0]["lr"] = lr
    assert same(params, before)
    keys = {i: set(optimizer.state[p]) for i, p in enumerate(params)}  # some libraries look here
    assert all(value.numel() == 0 for p in params for value in optimizer.state[p].values())
    assert optimizer.state_bytes() == 0
    assert optimizer.param_groups[0]["calls"] == 0
    probed = optimizer.state_dict()["state"]  # now the keys are there
    plain_params, plain = make(**settings)
    train(plain_params, plain, range(1))
    real = plain.state_dict()["state"]
    assert {i: set(v) for i, v in probed.items()} == {i: set(v) for i, v in real.items()} == keys
    train(params, optimizer, range(7))
    others, fresh = make(**settings)
    train(others, fresh, range(7))
    assert same(params, others)


@pytest.mark.parametrize("asks_first", [True, False])
@pytest.mark.parametrize("flatten", [True, False])
def test_distributed_checkpoint_reads_and_restores(tmp_path, flatten, asks_first):
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def build():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
        return model, Frugal(model.named_parameters(), lr=1e-2, update_gap=3)

    def steps(model, optimizer, numbers):
        for number in numbers:
            torch.manual_seed(number)
            optimizer.zero_grad()
            model(torch.randn(5, 8)).square().sum().backward()
            optimizer.step()

    model, optimizer = build()
    steps(model, optimizer, range(5))
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    torch.save(saved, tmp_path / "o.pt")
    other, resumed = build()
    if asks_first:
        get_optimizer_state_dict(other, resumed)  # probes: zero gradients, lr 0, empty state
    other.load_state_dict(model.state_dict())
    loaded = torch.load(tmp_path / "o.pt", weights_only=True)
    set_optimizer_state_dict(other, resumed, loaded, options=options)
    steps(model, optimizer, range(5, 11))
    steps(other, resumed, range(5, 11))
    assert same(model.parameters(), other.parameters())


# ------------------------------------------------------------------------- torch's habits
def test_scheduler_closure_and_hooks():
    params, optimizer = make()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("pre"))

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    first = float(optimizer.step(closure).detach())
    scheduler.step()
    second = float(optimizer.step(closure).detach())
    scheduler.step()
    assert second < first
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert called == ["pre", "pre"]


def test_lr_may_be_a_tensor():
    params, optimizer = make(lr=torch.tensor(1e-2))
    others, plain = make(lr=1e-2)
    train(params, optimizer, range(4))
    train(others, plain, range(4))
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(params, others, strict=True))


def test_maximize_is_descent_on_the_negative():
    for selection in SELECTIONS:
        params, up = make(maximize=True, selection=selection)
        others, down = make(selection=selection)
        for step in range(5):
            for p, q, g in zip(params, others, grads_of(step), strict=True):
                p.grad, q.grad = g, -g
            up.step()
            down.step()
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(params, others, strict=True))


def test_foreach_argument_chooses_the_implementation():
    for foreach, impl in ((True, "foreach"), (False, "reference")):
        params, optimizer = make(foreach=foreach)
        assert optimizer._impl == impl
        train(params, optimizer, range(2))


def test_grad_scaler_skips_steps_with_infinite_gradients():
    params, optimizer = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for bad in (False, True, False):
        optimizer.zero_grad()
        loss = sum((p * p).sum() for p in params)
        scaler.scale(loss).backward()
        if bad:
            params[0].grad[0, 0] = float("inf")
        before = [p.detach().clone() for p in params]
        scaler.step(optimizer)
        scaler.update()
        assert same(params, before) == bad
    assert optimizer.param_groups[0]["calls"] == 2


def test_add_param_group_and_thawed_parameters():
    params, optimizer = make()
    params[1].requires_grad_(False)
    gradients = grads_of(0)
    for i in (0, 2, 3, 4):
        params[i].grad = gradients[i]
    optimizer.step()
    assert params[1] not in optimizer.state
    late = torch.nn.Parameter(torch.randn(6, 6))
    optimizer.add_param_group({"params": [("late", late)], "density": 1.0, "selection": "rows"})
    params[1].requires_grad_(True)
    late.grad = torch.randn(6, 6)
    before = params[1].detach().clone()
    train(params, optimizer, range(1, 8))
    assert not torch.equal(before, params[1])
    assert optimizer.param_groups[1]["calls"] == 7
    with pytest.raises(ValueError, match="density"):
        optimizer.add_param_group(
            {"params": [("x", torch.nn.Parameter(torch.ones(2)))], "density": 2.0}
        )
    assert len(optimizer.param_groups) == 2


def test_thawing_keeps_the_others_state():
    torch.manual_seed(0)
    a, b = (torch.nn.Parameter(torch.randn(6, 6)) for _ in range(2))
    b.requires_grad_(False)
    optimizer = Frugal([{"params": [a, b], "split": False}], lr=1e-2)
    c = torch.nn.Parameter(a.detach().clone())
    adamw = torch.optim.AdamW([c], lr=1e-2, weight_decay=0.0, foreach=True)
    for step in range(6):
        a.grad = torch.randn(6, 6)
        c.grad = a.grad.clone()
        if step == 3:
            b.requires_grad_(True)
        if step >= 3:
            b.grad = torch.randn(6, 6)
        optimizer.step()
        adamw.step()
        assert torch.equal(a, c)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch 2.11, whatever is asked for
def test_sparse_and_complex_are_refused():
    p = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = Frugal([p])
    p.grad = torch.sparse_coo_tensor([[0], [1]], [1.0], (4, 3), check_invariants=True)
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()
    with pytest.raises(ValueError, match="complex"):
        Frugal([torch.nn.Parameter(torch.randn(2, dtype=torch.complex64))])


@pytest.mark.parametrize(("name", "value"), [
    ("density", 1.5), ("density", -0.1), ("update_gap", 0), ("selection", "block"), ("lr", -1.0),
    ("state_full", "adam"), ("state_free", "signum"), ("betas", (1.0, 0.9)), ("rounding", "up"),
    ("quantize", "4bit"), ("order", "sideways"), ("on_switch", "keep"), ("impl", "cuda"),
    ("complement", "none"), ("arena_density", 0.1), ("eps", -1.0),
])  # fmt: skip
def test_wrong_settings_are_refused_with_their_name(name, value):
    with pytest.raises(ValueError, match=name):
        make(**{name: value})


def test_strided_parameters():
    torch.manual_seed(0)
    base = torch.randn(6, 5, 4, 4)
    p = torch.nn.Parameter(base.clone().to(memory_format=torch.channels_last))
    q = torch.nn.Parameter(base.clone())
    assert not p.is_contiguous()
    first, second = (Frugal([("w", x)], lr=1e-2, density=0.5, update_gap=2) for x in (p, q))
    for _ in range(5):
        grad = torch.randn_like(base)
        p.grad, q.grad = grad.to(memory_format=torch.channels_last), grad.clone()
        first.step()
        second.step()
        assert torch.equal(p, q)


# ------------------------------------------------------------------------- state that travels
@pytest.mark.parametrize("selection", ["blocks", "columns", "svd"])
@pytest.mark.parametrize("way", ["replace", "data", "move_state"])
def test_state_may_be_moved_away_and_brought_back_between_steps(selection, way):
    params, optimizer = make(selection=selection)
    others, plain = make(selection=selection)
    for step in range(8):
        train(params, optimizer, [step])
        train(others, plain, [step])
        if way == "move_state":
            optimizer.move_state("cpu")
            continue
        for p in params:
            for key, value in list(optimizer.state[p].items()):
                if isinstance(value, torch.Tensor):
                    away = value.clone()  # in host memory, on SSD ...
                    value.zero_()  # ... while its place is used for something else
                    if way == "replace":
                        optimizer.state[p][key] = away
                    else:
                        value.data = away
        assert same(params, others)
