"""Fira and APOLLO against their papers' equations, written out; the contract of joint rules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from memopt.optim import Frugal, frugal_groups
from memopt.optim.presets import apollo, fira

GAP, RANK, GAMMA = 4, 3, 1.01


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer() for _ in range(3)])
        self.head = nn.Linear(8, 11)


def give_grads(model, step):
    generator = torch.Generator().manual_seed(step)
    size = 4.0 if step in (5, 9) else 1.0 - 0.05 * step  # growth in some steps, none in others
    for p in model.parameters():
        p.grad = size * torch.randn(p.shape, generator=generator)


class Written:
    """One matrix in the papers' layout: W (m, n) with m <= n, P (m, r) or (r, m)."""

    def __init__(self, weight):
        self.flip = weight.shape[0] > weight.shape[1]
        self.w = (weight.T if self.flip else weight).clone()
        self.m = self.v = torch.zeros(RANK, self.w.shape[1])
        self.t, self.last = 0, None
        self.limited = 0

    def adam(self, r):
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * r
        self.v = 0.999 * self.v + 0.001 * r**2
        return (self.m / (1 - 0.9**self.t)) / ((self.v / (1 - 0.999**self.t)).sqrt() + 1e-8)

    def limit(self, update):
        if self.last is not None and update.norm() / self.last > GAMMA:
            update = update / update.norm() * GAMMA * self.last
            self.limited += 1
        self.last = update.norm()
        return update

    def weight(self):
        return self.w.T if self.flip else self.w


def compare(model, optimizer, update, steps=12):
    """Run both; `update` changes a Written given its gradient, the step and the basis in use."""
    written = {
        n: Written(p.detach()) for n, p in model.named_parameters() if n.startswith("layers")
    }
    for step in range(steps):
        give_grads(model, step)
        optimizer.step()
        for name, side in written.items():
            parameter = model.get_parameter(name)
            grad = parameter.grad.T if side.flip else parameter.grad
            update(side, grad, step, optimizer.state[parameter]["basis"])
            assert torch.allclose(parameter.detach(), side.weight(), rtol=1e-4, atol=3e-6), (
                name,
                step,
            )
    return written


def test_fira():
    model = Model()
    optimizer = fira(frugal_groups(model), lr=0.01, rank=RANK, update_gap=GAP, alpha=0.25)

    def update(side, g, step, basis):
        if step % GAP == 0:
            u = torch.linalg.svd(g)[0][:, :RANK]
            # moments are kept, so that signs of singular vectors matter: take the optimizer's
            side.p = u * (u * basis.T).sum(dim=0).sign()
            torch.testing.assert_close(side.p.T, basis, rtol=1e-3, atol=1e-4)
        r = side.p.T @ g
        n = side.adam(r)
        s = g - side.p @ r
        phi = side.limit(s * (n.norm(dim=0) / r.norm(dim=0)))
        side.w = side.w - 0.01 * 0.25 * (side.p @ n + phi)

    written = compare(model, optimizer, update)
    assert all(0 < side.limited < 12 for side in written.values())  # both branches were taken


@pytest.mark.parametrize("mini", [False, True])
def test_apollo(mini):
    model = Model()
    rank = None if mini else RANK
    optimizer = apollo(frugal_groups(model), 0.01, rank=rank, mini=mini, update_gap=GAP, alpha=2.0)
    drawn = set()

    def update(side, g, step, basis):
        drawn.add((step // GAP, float(basis[0, 0])))
        r = basis @ g
        if side.t == 0:
            side.m = side.v = torch.zeros_like(r)
        n = side.adam(r)
        s = n.norm() / r.norm() if mini else n.norm(dim=0) / r.norm(dim=0)
        side.w = side.w - 0.01 * 2.0 * side.limit(g * s)

    written = compare(model, optimizer, update)
    assert all(0 < side.limited < 12 for side in written.values())
    assert len(drawn) == 3 * len(written)  # a projection of its own each round and matrix
    state = next(values for p, values in optimizer.state.items() if "basis" in values)
    assert state["basis"].shape == ((1, 8) if mini else (RANK, 8))


def test_apollos_published_scales():
    weight = nn.Parameter(torch.zeros(4, 3))
    for settings, alpha in (({}, 1.0), ({"mini": True}, 128**0.5), ({"mini": True, "alpha": 2}, 2)):
        optimizer = apollo([weight], **settings)
        assert optimizer.param_groups[0]["state_full_lr_scale"] == alpha


def test_projection_has_the_papers_variance():
    weight = nn.Parameter(torch.zeros(400, 300))
    weight.grad = torch.randn(400, 300)
    optimizer = apollo([{"params": [weight]}], rank=100)
    optimizer.step()
    basis = optimizer.state[weight]["basis"]
    assert float(basis.var()) == pytest.approx(1 / 100, rel=0.05)
    assert abs(float(basis.mean())) < 0.002


@pytest.mark.parametrize("make", [fira, apollo])
def test_the_limiter_is_in_every_checkpoint(make):
    sides = []
    for _ in range(2):
        model = Model()
        sides.append((model, make(frugal_groups(model), rank=RANK, update_gap=GAP)))
    for step in range(9):
        for number, (model, optimizer) in enumerate(sides):
            give_grads(model, step)
            optimizer.step()
            if number and step == 5:
                saved = copy.deepcopy(optimizer.state_dict())
                fresh = make(frugal_groups(model), rank=RANK, update_gap=GAP)
                fresh.load_state_dict(saved)
                sides[1] = (model, fresh)
    for a, b in zip(sides[0][0].parameters(), sides[1][0].parameters(), strict=True):
        assert torch.equal(a, b)
    shown = [v["limiter_norm"] for v in sides[1][1].state.values() if "limiter_norm" in v]
    assert len(shown) == 6
    assert all(float(norm) > 0 for norm in shown)


@pytest.mark.parametrize("make", [fira, apollo])
def test_state_bytes(make):
    model = Model()
    optimizer = make(frugal_groups(model), rank=RANK)
    give_grads(model, 0)
    optimizer.step()
    head = 11 * 8 + 11
    matrix = 8 * RANK * 16 + 4 * RANK * 8 + 4  # moments, basis, limiter
    assert optimizer.state_bytes() == 8 * head + 6 * matrix


def test_vectors_of_a_split_group_are_adamw():
    vectors = [nn.Parameter(torch.ones(40)) for _ in range(2)]
    ours = fira([{"params": [vectors[0]], "density": 0.5}], lr=0.01, alpha=1.0)
    mask = None
    theirs = torch.optim.AdamW([vectors[1]], lr=0.01, weight_decay=0.0)
    for step in range(3):
        grad = torch.randn(40, generator=torch.Generator().manual_seed(step))
        for vector in vectors:
            vector.grad = grad.clone()
        ours.step()
        theirs.step()
        mask = ours.state_full_mask(vectors[0])
    assert int(mask.sum()) == 20
    torch.testing.assert_close(vectors[0][mask], vectors[1][mask], rtol=1e-5, atol=1e-7)
    assert torch.equal(vectors[0][~mask], torch.ones(20))


def test_selections_that_are_not_registered_are_refused():
    with pytest.raises(ValueError, match="selection='gauss' is not known"):
        Frugal([nn.Parameter(torch.zeros(2, 2))], selection="gauss")


def test_bfloat16_weights_and_8bit_moments_learn():
    for settings in ({}, {"quantize": "8bit"}, {"rounding": "kahan"}):
        torch.manual_seed(0)
        target = torch.randn(32, 24)
        weight = nn.Parameter(torch.zeros(32, 24, dtype=torch.bfloat16))
        optimizer = fira([{"params": [weight], "density": 0.25}], lr=0.1, alpha=1.0, **settings)
        for _ in range(60):
            weight.grad = (weight.detach().float() - target).bfloat16()
            optimizer.step()
        assert float((weight.detach().float() - target).square().mean()) < 0.2, settings
