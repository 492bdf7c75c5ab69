"""Every argument: its default, an effect or a refusal; settings that change nothing are told."""

from __future__ import annotations

import inspect
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from memopt.optim import Frugal, execute, frugal_groups, presets

# The signature that users were promised.
DEFAULTS = {
    "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "density": 0.25, "update_gap": 200,
    "selection": "blocks", "state_full": "adamw", "state_free": "sign", "state_full_lr_scale": 1.0,
    "state_free_lr_scale": 1.0, "on_switch": "reset", "order": "random", "complement": "exact",
    "quantize": None, "rounding": "nearest", "capturable": False, "seed": 0, "impl": "auto",
}  # fmt: skip


def test_the_signature():
    found = inspect.signature(Frugal).parameters
    assert list(found)[:5] == ["params", "lr", "betas", "eps", "weight_decay"]
    assert {name: found[name].default for name in DEFAULTS} == DEFAULTS
    keyword_only = {n for n, p in found.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert set(DEFAULTS) - {"betas", "eps", "weight_decay"} <= keyword_only


def trained(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((9, 12), (12, 7), (20, 16))]
    settings = {"lr": 1e-2, "update_gap": 2, **settings}
    optimizer = Frugal([(f"layer{i}", p) for i, p in enumerate(params)], **settings)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()
    return params


@pytest.mark.parametrize(("name", "value", "around"), [
    ("lr", 2e-2, {}), ("betas", (0.8, 0.999), {}), ("betas", (0.9, 0.9), {}), ("eps", 1.0, {}),
    ("weight_decay", 0.5, {}), ("density", 0.6, {}), ("update_gap", 3, {}),
    *[("selection", s, {}) for s in ("columns", "rows", "coordinates", "svd", "random", "randperm")],
    ("state_full", "lion", {}), ("state_full", "sgdm", {}),
    *[("state_free", s, {}) for s in ("sgd", "column_normalized", "none")],
    ("state_full_lr_scale", 0.5, {}), ("state_free_lr_scale", 0.5, {}),
    ("on_switch", "project", {"density": 0.7}), ("on_switch", "keep", {"selection": "svd"}),
    *[("order", s, {}) for s in ("ascending", "descending", "mirror")],
    ("complement", "reference", {"selection": "svd"}), ("quantize", "8bit", {}),
    ("rounding", "stochastic", {"dtype": torch.bfloat16}),
    ("rounding", "kahan", {"dtype": torch.bfloat16}), ("rounding", "stochastic", {"quantize": "8bit"}),
    ("seed", 1, {}), ("maximize", True, {}),
])  # fmt: skip
def test_every_argument_has_an_effect(name, value, around):
    plain, changed = trained(**around), trained(**around, **{name: value})
    assert not all(torch.equal(a, b) for a, b in zip(plain, changed, strict=True))


@pytest.mark.parametrize(("name", "value"), [
    ("density", None), ("density", math.nan), ("density", "0.5"), ("arena_density", "1"),
    ("update_gap", None), ("update_gap", math.inf), ("update_gap", 1.5), ("update_gap", "7"),
    ("betas", None), ("betas", 0.9), ("betas", ("a", "b")), ("betas", (0.9,)),
    ("betas", (0.9, math.nan)), ("seed", "abc"), ("seed", 1.5), ("seed", None), ("quantize", 8),
])  # fmt: skip
def test_values_of_another_kind_are_refused_with_their_name(name, value):
    with pytest.raises(ValueError, match=rf"{name}="):
        Frugal([nn.Parameter(torch.ones(2))], **{name: value})


@pytest.mark.parametrize(("settings", "told"), [
    ({"rounding": "kahan"}, "rounding='kahan' has no effect: no parameter is bfloat16"),
    ({"rounding": "stochastic"}, "rounding='stochastic' has no effect"),
    ({"order": "mirror", "selection": "rows"}, "order='mirror' has no effect"),
    ({"complement": "reference"}, "complement='reference' has no effect"),
])  # fmt: skip
def test_settings_without_an_effect_are_told(settings, told):
    with pytest.warns(UserWarning, match=told) as seen:
        Frugal([nn.Parameter(torch.ones(4, 4))], **settings)
    assert seen[0].filename == __file__


@pytest.mark.parametrize(("shapes", "density", "told"), [
    ([(40, 10)], 0.25, "75% of all elements never"), ([(30,)], 0.25, "1 of 1 tensors are larger"),
    ([(40, 10)] * 12, 0.01, "12 of 12 tensors are larger"), ([(40, 10)] * 12, 0.25, ""),
    ([(40, 10)], 0.0, ""), ([(40, 10)], 1.0, ""),
])  # fmt: skip
def test_blocks_that_could_never_have_state_are_told(shapes, density, told):
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = Frugal(params, density=density)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match=told) if told else nullcontext():
        optimizer.step()


def test_settings_with_an_effect_in_one_group_are_not_told():
    low, high = nn.Parameter(torch.ones(4, 4).bfloat16()), nn.Parameter(torch.ones(4))
    groups = [{"params": [low]}, {"params": [high], "split": False}]
    Frugal(groups, rounding="kahan", order="mirror")


def test_two_words_for_the_implementation():
    weight = nn.Parameter(torch.ones(2))
    assert Frugal([weight], foreach=True, impl="foreach")._impl == "foreach"
    with pytest.raises(ValueError, match="foreach=False means impl='reference'"):
        Frugal([weight], foreach=False, impl="native")
    with pytest.raises(ValueError, match="impl is the optimizer's"):
        Frugal([{"params": [weight], "impl": "reference"}])


def test_an_implementation_that_cannot_run_changes_nothing():
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = Frugal([weight], impl="native", selection="columns")
    weight.grad = torch.ones(4, 4)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="on cpu"):
            optimizer.step()
    assert optimizer.state[weight]["step"] == 0
    assert torch.equal(weight, torch.ones(4, 4))


def test_a_missing_kernel_is_told_on_a_gpu_only(monkeypatch):
    absent = SimpleNamespace(reason="not built: run tools/build_cuda.py")
    monkeypatch.setattr(execute, "cuda_status", lambda: absent)
    with pytest.warns(UserWarning, match=r"several times slower.*run tools/build_cuda\.py"):
        execute._tell_of_missing_kernels("cuda", absent.reason)
    for device, reason in (
        ("cpu", absent.reason),
        ("cuda", "selection svd is matrix products"),
        ("cuda", ""),
    ):
        execute._tell_of_missing_kernels(device, reason)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 8) for _ in range(2)])
        self.head = nn.Linear(8, 5)


def test_frugal_groups_knows_its_settings():
    groups = frugal_groups(Layers(), selection="columns", weight_decay=0.1, order="random")
    assert groups[0]["selection"] == "columns"
    for wrong in ({"selction": "columns"}, {"impl": "reference"}, {"foreach": True}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*no settings of a group"):
            frugal_groups(Layers(), **wrong)


@pytest.mark.parametrize("name", ["galore", "fira", "apollo", "badam", "sinkgd", "adafrugal"])
@pytest.mark.parametrize("named", [True, False])
def test_presets_take_parameters_without_groups(name, named):
    build = getattr(presets, name)
    settings = {"num_blocks": 2} if name == "badam" else {}
    weights = []
    for groups in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.Linear(6, 8, bias=False))
        given = model.named_parameters() if named else model.parameters()
        optimizer = build([{"params": list(given)}] if groups else given, **settings)
        optimizer = optimizer[0] if isinstance(optimizer, tuple) else optimizer
        for p in model.parameters():
            p.grad = torch.randn(p.shape)
        optimizer.step()
        weights.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
