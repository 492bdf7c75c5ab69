"""What users do to optimizers: each is exact, or refused with its reason."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from memopt.optim import Frugal, frugal_groups
from tests.optim.test_optimizer_contract import SELECTIONS, SHAPES, grads_of, make, same, train


def pair(dtype=torch.float32, **settings):
    return make(dtype, **settings), make(dtype, **settings)


# ------------------------------------------------------------------------- gradients and weights
@pytest.mark.parametrize("selection", SELECTIONS)
def test_gradients_of_any_layout_and_dtype(selection):
    (params, optimizer), (others, plain) = pair(selection=selection)
    for step in range(7):
        for p, q, grad in zip(params, others, grads_of(step), strict=True):
            if step % 4 == 0 and p.dim() == 2:
                p.grad, q.grad = torch.full((1, 1), 0.5).expand_as(p), torch.full_like(q, 0.5)
            elif step % 4 == 1 and p.dim() == 2:
                p.grad, q.grad = grad.T.contiguous().T, grad
            elif step % 4 == 2:
                p.grad_dtype = None
                p.grad, q.grad = grad.bfloat16(), grad.bfloat16().float()
            else:
                p.grad, q.grad = grad.clone(), grad
        optimizer.step()
        plain.step()
        for p in params:
            p.grad = None
        assert same(params, others)


@pytest.mark.filterwarnings("ignore:.*chooses whole tensors")
@pytest.mark.parametrize("selection", SELECTIONS)
def test_channels_last_with_kahan_and_views_of_a_buffer(selection):
    settings = {"lr": 1e-2, "update_gap": 2, "selection": selection}
    base = torch.randn(10, 12, generator=torch.Generator().manual_seed(0))
    around = base.clone()
    conv = torch.randn(6, 5, 4, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    params = [torch.nn.Parameter(x) for x in (base[2:6], base[6:, 3:9])]
    others = [torch.nn.Parameter(x.detach().clone(memory_format=torch.contiguous_format)) for x in params]  # fmt: skip
    params.append(torch.nn.Parameter(conv.clone().to(memory_format=torch.channels_last)))
    others.append(torch.nn.Parameter(conv.clone()))
    both = [
        Frugal([(str(i), p) for i, p in enumerate(x)], rounding="kahan", **settings)
        for x in (params, others)
    ]
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(params, others, strict=True):
            q.grad = torch.randn(q.shape, generator=generator).to(q.dtype)
            p.grad = (
                q.grad.contiguous(memory_format=torch.channels_last) if q.dim() == 4 else q.grad
            )
        for optimizer in both:
            optimizer.step()
        assert same(params, others)
    assert torch.equal(base[:2], around[:2])
    assert torch.equal(base[6:, :3], around[6:, :3])


@pytest.mark.filterwarnings("ignore:.*chooses whole tensors")
@pytest.mark.parametrize("selection", SELECTIONS)
def test_tensors_without_elements_and_without_dimensions(selection):
    shapes = [(0,), (0, 5), (5, 0), (), (8, 6)]
    sides = []
    for _ in range(2):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        named = [(str(i), p) for i, p in enumerate(params)]
        sides.append((params, Frugal(named, density=0.3, update_gap=3, selection=selection)))
    for step in range(9):
        generator = torch.Generator().manual_seed(step)
        grads = [torch.randn(shape, generator=generator) for shape in shapes]
        for params, optimizer in sides:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            optimizer.step()
        if step == 4:
            sides[1][1].load_state_dict(copy.deepcopy(sides[0][1].state_dict()))
    assert same(sides[0][0], sides[1][0])


def test_a_subspace_is_not_chosen_from_a_broken_gradient():
    params, optimizer = make(selection="svd")
    before = [p.detach().clone() for p in params]
    for p, grad in zip(params, grads_of(0), strict=True):
        p.grad = grad
    params[1].grad[2, 3] = float("nan")
    with pytest.raises(ValueError, match="'layer1': its gradient has NaN"):
        optimizer.step()
    assert same(params, before)
    (others, plain) = make(selection="svd")
    train(params, optimizer, range(5))  # the step can be tried again
    train(others, plain, range(5))
    assert same(params, others)


def test_parameters_listed_twice_are_refused():
    weight = torch.nn.Parameter(torch.ones(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch only warns
        with pytest.raises(ValueError, match="parameter 0 is in the group 2 times"):
            Frugal([weight, weight])
        with pytest.raises(ValueError, match="'head' is in the group 2 times"):
            Frugal([("head", weight), ("embedding", weight)])


# ------------------------------------------------------------------------- surroundings
@pytest.mark.parametrize("selection", SELECTIONS)
def test_autocast_around_the_step_changes_nothing(selection):
    (params, optimizer), (others, plain) = pair(selection=selection, on_switch="project")
    for step in range(5):
        for p, q, grad in zip(params, others, grads_of(step), strict=True):
            p.grad, q.grad = grad, grad.clone()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            optimizer.step()
        plain.step()
        assert same(params, others)


@pytest.mark.parametrize("selection", ["blocks", "random"])
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(selection, default):
    settings = {"selection": selection, "quantize": "8bit"}
    (params, optimizer), (others, plain) = pair(torch.bfloat16, **settings)
    grads = [grads_of(step, torch.bfloat16) for step in range(5)]
    for given in grads:
        for p, q, grad in zip(params, others, given, strict=True):
            p.grad, q.grad = grad, grad.clone()
        torch.set_default_dtype(default)
        try:
            optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        plain.step()
    assert same(params, others)
    for p, q in zip(params, others, strict=True):
        for key, value in plain.state[q].items():
            assert (
                not isinstance(value, torch.Tensor) or optimizer.state[p][key].dtype == value.dtype
            )


@pytest.mark.slow  # Dynamo's first call takes seconds
def test_a_compiled_step_is_the_step():
    (params, optimizer), (others, plain) = pair()
    compiled = torch.compile(optimizer.step)
    for step in range(7):
        for p, q, grad in zip(params, others, grads_of(step), strict=True):
            p.grad, q.grad = grad, grad.clone()
        compiled()
        plain.step()
        assert same(params, others)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_deterministic_mode(selection):
    params, optimizer = make(selection=selection, on_switch="project")
    torch.use_deterministic_algorithms(True)
    try:
        train(params, optimizer, range(7))
    finally:
        torch.use_deterministic_algorithms(False)
    others, plain = make(selection=selection, on_switch="project")
    train(others, plain, range(7))
    assert same(params, others)


def test_grad_scaler_skips_the_first_and_the_switch_step():
    (params, optimizer), (others, plain) = pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(10):
        optimizer.zero_grad()
        grads = grads_of(step)
        scaler.scale(sum((p * g).sum() for p, g in zip(params, grads, strict=True))).backward()
        broken = step in (0, 4, 8)  # without these, calls 0, 3 and 6 switch: steps 1, 5 and 9
        if broken:
            params[1].grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update(new_scale=4.0)
        if not broken:
            train(others, plain, [step])
        assert same(params, others)
    assert optimizer.param_groups[0]["calls"] == 7


def test_warm_up_from_0_and_schedules_that_miss_0_by_their_rounding():
    params, optimizer = make()
    before = [p.detach().clone() for p in params]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 4)
    train(params, optimizer, [0])
    assert same(params, before)
    scheduler.step()
    train(params, optimizer, [1])
    assert not same(params, before)
    optimizer.param_groups[0]["lr"] = -1e-21
    train(params, optimizer, [2])
    assert optimizer.param_groups[0]["calls"] == 3


# ------------------------------------------------------------------------- changes on the way
@pytest.mark.parametrize(("name", "value"), [
    ("selection", "columns"), ("state_full", "lion"), ("quantize", "8bit"), ("rounding", "kahan"),
    ("split", False), ("seed", 5), ("order", "mirror"), ("arena_density", 0.9),
])  # fmt: skip
def test_settings_that_the_state_follows_from_cannot_change(name, value):
    params, optimizer = make()
    train(params, optimizer, range(2))
    kept = optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"{name}=.*when the group's state was made"):
        train(params, optimizer, [2])
    optimizer.param_groups[0][name] = kept
    train(params, optimizer, [2])
    assert optimizer.param_groups[0]["calls"] == 3


def test_a_model_that_is_cast_after_its_first_step_is_refused():
    params, optimizer = make()
    train(params, optimizer, range(2))
    for p in params:
        p.data = p.data.bfloat16()
    with pytest.raises(ValueError, match=r"is torch\.bfloat16 on cpu, its state was made for"):
        train(params, optimizer, [2], torch.bfloat16)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_freezing_and_thawing_over_a_switch(selection):
    params, optimizer = make(selection=selection)
    train(params, optimizer, range(2))
    params[0].requires_grad_(False)
    frozen = params[0].detach().clone()
    for step in range(2, 8):
        params[0].grad = None
        for p, grad in zip(params[1:], grads_of(step)[1:], strict=True):
            p.grad = grad
        optimizer.step()
    assert torch.equal(params[0], frozen)
    params[0].requires_grad_(True)
    others, resumed = make(selection=selection)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(params, optimizer, range(8, 14))
    train(others, resumed, range(8, 14))
    assert same(params, others)


# ------------------------------------------------------------------------- loading
def changed_state(change):
    params, optimizer = make(rounding="kahan", dtype=torch.bfloat16)
    train(params, optimizer, range(5), torch.bfloat16)
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    return state


@pytest.mark.filterwarnings("ignore:.*chooses whole tensors")
@pytest.mark.parametrize(("change", "why"), [
    (lambda s: s["state"][0].pop("exp_avg"), r"'layer0' lacks \['exp_avg'\]"),
    (lambda s: s["state"][1].pop("step"), r"'layer1' lacks \['step'\]"),
    (lambda s: s["state"][1].pop("compensation"), r"'layer1' lacks \['compensation'\]"),
    (lambda s: s["state"][1].update(compensation=torch.zeros(3)), "compensation"),
    (lambda s: s["state"].update({77: {}}), "parameter 77"),
    (lambda s: s["param_groups"][0].pop("seed"), r"lack \['seed'\]"),
    (lambda s: s["param_groups"][0].update(density=0.9), "above arena_density"),
    (lambda s: s["param_groups"][0].update(density=0.1, arena_density=0.1), "same density"),
    (lambda s: s["param_groups"].append(s["param_groups"][0]), "same groups"),
])  # fmt: skip
def test_a_state_that_is_not_whole_is_refused_and_changes_nothing(change, why):
    (params, optimizer), (others, plain) = pair(torch.bfloat16, rounding="kahan")
    train(params, optimizer, range(4), torch.bfloat16)
    train(others, plain, range(4), torch.bfloat16)
    with pytest.raises(ValueError, match=why):
        optimizer.load_state_dict(changed_state(change))
    train(params, optimizer, range(4, 9), torch.bfloat16)
    train(others, plain, range(4, 9), torch.bfloat16)
    assert same(params, others)


def test_a_state_for_another_dtype_is_refused():
    params, optimizer = make()
    train(params, optimizer, range(2))
    _, other = make(torch.bfloat16)
    with pytest.raises(ValueError, match="weights of the same dtype"):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("saved_with_names", [True, False])
def test_the_names_of_the_saved_run_go_on(saved_with_names):
    def build(*, names):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
        given = [(f"layer{i}", p) for i, p in enumerate(params)] if names else params
        return params, Frugal(given, lr=1e-2, update_gap=3, selection="columns")

    params, optimizer = build(names=saved_with_names)
    train(params, optimizer, range(5))
    others, resumed = build(names=not saved_with_names)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    resumed.load_state_dict(optimizer.state_dict())
    train(params, optimizer, range(5, 12))
    train(others, resumed, range(5, 12))
    assert same(params, others)


def test_an_open_partial_step_is_not_copied():
    params, optimizer = make()
    train(params, optimizer, range(2))
    optimizer.step_partial([params[0]])
    with pytest.raises(RuntimeError, match="partial step is open"):
        copy.deepcopy(optimizer)
    optimizer.step()
    copy.deepcopy(optimizer)


@pytest.mark.filterwarnings("ignore:.*chooses whole tensors")
def test_a_group_added_in_the_middle_of_a_gap_goes_on_after_a_load():
    sides = []
    for _ in range(2):
        params, optimizer = make()
        late = torch.nn.Parameter(torch.ones(9, 9))
        sides.append((params, late, optimizer))
    (params, late, optimizer), (others, latest, resumed) = sides
    train(params, optimizer, range(4))
    optimizer.add_param_group({"params": [("late", late)], "density": 0.5})
    late.grad = torch.randn(9, 9)
    train(params, optimizer, range(4, 6))
    resumed.add_param_group({"params": [("late", latest)], "density": 0.5})
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip([*params, late], [*others, latest], strict=True):
        q.data.copy_(p.data)
    latest.grad = late.grad.clone()
    train(params, optimizer, range(6, 12))
    train(others, resumed, range(6, 12))
    assert same([*params, late], [*others, latest])


# ------------------------------------------------------------------------- other libraries
@pytest.mark.parametrize("selection", ["blocks", "svd"])
def test_transformers_trainer_resumes_bitwise(selection, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 48

        def __getitem__(self, i):
            tokens = torch.randint(64, (16,), generator=torch.Generator().manual_seed(i))
            return {"input_ids": tokens, "labels": tokens}

    def run(folder, resume=None):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=16,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        groups = frugal_groups(model, 0.25, selection=selection, update_gap=3)
        optimizer = Frugal(groups, lr=1e-3)
        schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 2, 10)
        arguments = transformers.TrainingArguments(
            output_dir=str(folder), max_steps=8, per_device_train_batch_size=2, save_steps=4,
            gradient_accumulation_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=Data(), optimizers=(optimizer, schedule)
        )
        trainer.train(resume_from_checkpoint=resume)
        assert optimizer.param_groups[0]["calls"] == 8
        return list(model.parameters())

    first = run(tmp_path / "a")
    second = run(tmp_path / "b", str(tmp_path / "a" / "checkpoint-4"))
    assert same(first, second)
