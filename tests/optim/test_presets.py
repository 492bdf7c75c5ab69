"""Each preset against its paper's equations, written out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from memopt.optim import Frugal, frugal_groups
from memopt.optim.presets import AdaFrugalSchedule, adafrugal, badam, galore, scale, sinkgd


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)


class Model(nn.Module):
    def __init__(self, layers=4):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([Layer() for _ in range(layers)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)


def give_grads(model, step):
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def adam(g, m, v, t, b1=0.9, b2=0.999, eps=1e-8):
    m.mul_(b1).add_((1 - b1) * g)
    v.mul_(b2).add_((1 - b2) * g * g)
    return (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)


def test_galore():
    model, alpha, rank, gap = Model(), 0.25, 3, 4
    optimizer = galore(frugal_groups(model), lr=0.01, rank=rank, update_gap=gap, alpha=alpha)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith("layers")}
    memory = {}
    for step in range(10):
        give_grads(model, step)
        optimizer.step()
        for name, w in weights.items():
            g = model.get_parameter(name).grad
            right = g.shape[0] >= g.shape[1]
            if step % gap == 0:
                # Signs of singular vectors are arbitrary, and kept moments see them: take ours.
                _, _, vh = torch.linalg.svd(g if right else g.T, full_matrices=False)
                ours = optimizer.state[model.get_parameter(name)]["basis"]
                turned = vh[:rank] * (vh[:rank] * ours).sum(dim=1, keepdim=True).sign()
                torch.testing.assert_close(turned, ours, rtol=1e-3, atol=1e-4)
                basis = turned if right else turned.T
                _, m, v = memory.get(name, (None, None, None))
                shape = (g.shape[0], rank) if right else (rank, g.shape[1])
                memory[name] = (
                    basis,
                    torch.zeros(shape) if m is None else m,
                    torch.zeros(shape) if v is None else v,
                )
            basis, m, v = memory[name]
            low = g @ basis.T if right else basis.T @ g
            n = adam(low, m, v, step + 1)
            w -= 0.01 * alpha * (n @ basis if right else basis @ n)
        for name, w in weights.items():
            torch.testing.assert_close(model.get_parameter(name).detach(), w, rtol=1e-4, atol=2e-6)
    assert {group["density"] for group in optimizer.param_groups if group["split"]} == {rank / 8}
    with pytest.raises(ValueError, match="rank=8"):
        galore(frugal_groups(Model()), rank=8)


@pytest.mark.parametrize("layers", [2, 3, 4, 7])  # 1/3 and 1/7 are no exact densities
def test_badam(layers):
    model, gap = Model(layers), 3
    optimizer = badam(frugal_groups(model), lr=0.01, num_blocks=layers, switch_every=gap)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith("layers")}
    memory = {}
    for step in range(layers * gap * 2 + 2):
        give_grads(model, step)
        if step % gap == 0:
            memory = {}
        active = (step // gap) % layers
        for name, w in weights.items():
            if name.startswith(f"layers.{active}."):
                m, v = memory.setdefault(name, (torch.zeros_like(w), torch.zeros_like(w)))
                w -= 0.01 * adam(model.get_parameter(name).grad, m, v, step % gap + 1)
        optimizer.step()
        for name, w in weights.items():
            torch.testing.assert_close(model.get_parameter(name).detach(), w, rtol=1e-5, atol=1e-6)


def test_scale():
    model, lr, beta = Model(), 0.01, 0.9
    optimizer = scale(model, lr=lr, momentum=beta)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    momentum = torch.zeros_like(weights["head.weight"])
    vectors = copy.deepcopy(model.norm)
    adamw = torch.optim.AdamW(vectors.parameters(), lr=lr, weight_decay=0.0)
    for step in range(5):
        give_grads(model, step)
        for name, w in weights.items():
            g = model.get_parameter(name).grad
            if name == "head.weight":
                momentum = beta * momentum + (1 - beta) * g
                w -= lr * momentum / momentum.norm(dim=1, keepdim=True)
            elif name == "embed.weight":
                w -= lr * g / g.norm(dim=0, keepdim=True)
            elif w.dim() == 2:
                w -= lr * g / g.norm(dim=1, keepdim=True)
        for p, q in zip(vectors.parameters(), model.norm.parameters(), strict=True):
            p.grad = q.grad.clone()
        adamw.step()
        optimizer.step()
        for name, w in weights.items():
            if w.dim() == 2:
                torch.testing.assert_close(
                    model.get_parameter(name).detach(), w, rtol=1e-5, atol=1e-6
                )
        torch.testing.assert_close(model.norm.weight, vectors.weight, rtol=1e-5, atol=1e-6)
    norms, head = 2 * 8, 11 * 8
    assert optimizer.state_bytes() == 8 * norms + 4 * head


def test_adafrugal():
    model = Model()
    optimizer, schedule = adafrugal(
        frugal_groups(model), lr=0.01,
        schedule={"density_start": 0.5, "density_end": 0.1, "density_steps": 20, "gap_start": 4, "gap_max": 10},
    )  # fmt: skip
    split = optimizer.param_groups[0]
    arena = None
    switches, used = [], []
    for step in range(30):
        give_grads(model, step)
        before = split["round"]
        optimizer.step()
        bucket = optimizer._groups[0].buckets[0]
        arena = arena or bucket.arena.capacity
        assert bucket.arena.capacity == arena
        if step == 0 or split["round"] != before:
            switches.append(step)
            density = split["active_density"]
            assert density == pytest.approx(0.5 - 0.4 * min(step, 20) / 20)
            used.append(sum(part.num_slots for part in bucket.parts))
            assert used[-1] <= density * 1024
        schedule.step()
        if step in (9, 19, 24):
            schedule.validated({9: 3.0, 19: 2.99, 24: 2.5}[step])
        if step == 13:  # a checkpoint in between changes nothing
            saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
            split.update(density=0.3, update_gap=77)
            optimizer.load_state_dict(saved[0])
            schedule.load_state_dict(saved[1])
            split = optimizer.param_groups[0]
    # T = 4 until the loss stalls at step 19 (3.0 -> 2.99), then 6, also for the gap that is open
    assert switches == [0, 4, 8, 12, 16, 22, 28]
    assert split["update_gap"] == 6
    assert used[0] > 3 * used[-1]
    with pytest.raises(ValueError, match="arena_density"):
        AdaFrugalSchedule(Frugal(frugal_groups(Model())), density_start=0.9)


@pytest.mark.parametrize("iterations", [5, 2])
def test_sinkgd(iterations):
    """Algorithm 3 with the diagonal matrices of row norms Q(X) and of column norms R(X)."""
    model = Model()
    settings = {} if iterations == 5 else {"iterations": iterations}
    optimizer = sinkgd(frugal_groups(model), lr=0.01, alpha=0.5, weight_decay=0.1, **settings)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith("layers")}
    plain = copy.deepcopy(model)
    others = [p for n, p in plain.named_parameters() if not n.startswith("layers")]
    adamw = torch.optim.AdamW(others, lr=0.01, weight_decay=0.1)
    for step in range(3):
        give_grads(model, step)
        give_grads(plain, step)
        model.layers[0].up.weight.grad[3] = 0.0  # a unit without gradient rests
        optimizer.step()
        adamw.step()
        for name, w in weights.items():
            x = model.get_parameter(name).grad.double()
            m, n = x.shape
            for _ in range(iterations):
                x = n**0.5 * torch.diag(1 / x.norm(dim=1).clamp_min(1e-12)) @ x
                x = m**0.5 * x @ torch.diag(1 / x.norm(dim=0))
            w.copy_(w * (1 - 0.01 * 0.1) - 0.01 * 0.5 * x)
            torch.testing.assert_close(model.get_parameter(name).detach(), w, rtol=1e-5, atol=1e-6)
    for name in ("embed.weight", "norm.weight", "norm.bias", "head.weight"):
        torch.testing.assert_close(model.get_parameter(name), plain.get_parameter(name))
    states = [optimizer.state[p] for p in model.layers.parameters()]
    assert all(s["exp_avg"].numel() == 0 for s in states)
    with pytest.raises(ValueError, match="iterations=0"):
        sinkgd(frugal_groups(model), iterations=0)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_sinkgd_sees_no_scale(size):
    """Squares of these gradients are no float32 numbers; the update is that of any other scale."""
    weights = [nn.Parameter(torch.zeros(6, 4)) for _ in range(2)]
    grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    for weight, factor in zip(weights, (1.0, size), strict=True):
        weight.grad = grad * factor
        sinkgd([{"params": [weight]}], lr=0.1).step()
    torch.testing.assert_close(weights[0], weights[1])
