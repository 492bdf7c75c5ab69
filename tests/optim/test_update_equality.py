"""Every selection and rule, update by update, against plain PyTorch over three switches."""

from __future__ import annotations

import pytest
import torch

from memopt.optim import Frugal
from tests.optim.plain_frugal import Plain

CFG = {
    "lr": 1e-2, "wd": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "full_scale": 0.7, "free_scale": 0.3,
}  # fmt: skip
SHAPES = [(24, 20), (16, 40), (30,), (4, 3, 5), (7, 7), ()]
GAP = 4


def build(selection, full, free, **extra):
    torch.manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = Frugal(
        [(f"layer{i}", p) for i, p in enumerate(params)],
        lr=CFG["lr"], betas=CFG["betas"], eps=CFG["eps"], weight_decay=CFG["wd"], update_gap=GAP,
        selection=selection, state_full=full, state_free=free, density=0.3,
        state_full_lr_scale=CFG["full_scale"], state_free_lr_scale=CFG["free_scale"], **extra,
    )  # fmt: skip
    return params, optimizer


def matrix(p):
    return p.reshape(p.shape[0], -1) if p.dim() > 1 else p.reshape(-1)


def low_rank(selection, p):
    return selection in ("svd", "random") and p.dim() > 1


def leaves_out(free, plain, p):
    """Signs of numbers near zero may differ: the issue leaves |g_free| <= 1e-5 out."""
    if free != "sign":
        return torch.zeros_like(p, dtype=torch.bool)
    near = plain.free_grad.abs() <= 1e-5
    g2 = matrix(p)
    near = near if g2.shape[0] >= g2.shape[1] else near.T
    # an uncertain sign reaches the other elements through `s - P^T P s`: its whole line is left out
    lines = (
        near.any(dim=1, keepdim=True) if g2.shape[0] >= g2.shape[1] else near.any(0, keepdim=True)
    )
    return lines.expand_as(g2).reshape(p.shape)


@pytest.mark.parametrize("impl", ["reference", "foreach"])
@pytest.mark.parametrize("free", ["sign", "sgd", "column_normalized", "none"])
@pytest.mark.parametrize("full", ["adamw", "lion", "sgdm"])
@pytest.mark.parametrize(
    "selection", ["blocks", "columns", "rows", "coordinates", "svd", "random", "randperm"]
)
def test_equal_update_by_update(selection, full, free, impl):
    params, optimizer = build(selection, full, free, impl=impl)
    cfg = {**CFG, "full": full, "free": free}
    plains = [Plain(cfg) for _ in params]
    generator = torch.Generator().manual_seed(7)
    worst = 0.0
    for call in range(3 * GAP + 2):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        for p, w, plain in zip(params, before, plains, strict=True):
            if call % GAP == 0:
                plain.reset()
            keys = {}
            if low_rank(selection, p):
                keys["basis"] = optimizer.state[p]["basis"]
            else:
                keys["mask"] = matrix(optimizer.state_full_mask(p))
            expected = plain.update(matrix(w), matrix(p.grad), **keys).reshape(p.shape)
            error = (p.detach() - expected).abs()
            if low_rank(selection, p):
                error = error[~leaves_out(free, plain, p)]
            worst = max(worst, float(error.max() / w.abs().max()))
    assert worst <= 1e-6, worst
    assert optimizer.param_groups[0]["round"] == 3


@pytest.mark.parametrize("selection", ["svd", "random"])
def test_basis_is_orthonormal_and_svd_is_the_gradients(selection):
    params, optimizer = build(selection, "adamw", "sign")
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p in params[:2]:
        basis = optimizer.state[p]["basis"]
        torch.testing.assert_close(basis @ basis.T, torch.eye(basis.shape[0]), atol=1e-5, rtol=0)
        if selection == "svd":
            g = p.grad if p.shape[0] >= p.shape[1] else p.grad.T
            captured = (g @ basis.T).square().sum()
            best = torch.linalg.svdvals(g)[: basis.shape[0]].square().sum()
            torch.testing.assert_close(captured, best, rtol=1e-4, atol=0)


@pytest.mark.parametrize("complement", ["exact", "reference"])
def test_complement_stays_out_of_the_subspace(complement):
    params, optimizer = build("svd", "adamw", "sign", complement=complement)
    cfg = {**CFG, "full": "adamw", "free": "sign", "exact": complement == "exact"}
    w = params[0].detach().clone()
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    basis = optimizer.state[params[0]]["basis"]
    plain = Plain(cfg)
    expected = plain.update(w, params[0].grad, basis=basis)
    assert (params[0].detach() - expected).abs().max() <= 1e-6 * w.abs().max()
    # What the state-free update leaves in the subspace: nothing, or a leak of the sign.
    full_only = Plain({**cfg, "free": "none"}).update(w, params[0].grad, basis=basis)
    leak = ((params[0].detach() - full_only) @ basis.T).abs().max()
    if complement == "exact":
        assert leak < 1e-7
    else:
        assert leak > 1e-4


@pytest.mark.parametrize("impl", ["reference", "foreach"])
@pytest.mark.parametrize("quantize", [None, "8bit"])
@pytest.mark.parametrize("free", ["sign", "sgd", "column_normalized"])
@pytest.mark.parametrize("full", ["adamw", "lion", "sgdm"])
@pytest.mark.parametrize("selection", ["blocks", "columns", "rows", "coordinates", "random"])
def test_nan_gradient_is_not_hidden(selection, full, free, quantize, impl):
    """The weights with NaN in their gradient are NaN at once, and stay so."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.ones(12, 40)) for _ in range(2)]
    optimizer = Frugal(params, lr=0.1, density=0.5, selection=selection, state_full=full,
                       state_free=free, quantize=quantize, impl=impl)  # fmt: skip
    for step in range(3):
        for p in params:
            p.grad = torch.randn(12, 40)
            if step == 1:
                p.grad[:, ::7] = float("nan")
        optimizer.step()
        for p in params:
            assert p[:, ::7].isnan().all() if step else p.isfinite().all()


@pytest.mark.parametrize("full", ["adamw", "lion", "sgdm"])
@pytest.mark.parametrize("impl", ["reference", "foreach"])
def test_the_moments_of_a_nan_gradient_say_so(full, impl):
    """In 8 bits its whole block does: one scale is all that a block has for what is no number."""
    p = torch.nn.Parameter(torch.ones(4, 256))
    p.grad = torch.randn(4, 256)
    p.grad[1, 5] = float("nan")
    optimizer = Frugal([p], density=1.0, state_full=full, quantize="8bit", impl=impl)
    optimizer.step()
    arena = optimizer._groups[0].buckets[0].arena
    for moment in arena.load(0, p.numel(), torch.float32):
        assert moment.view(4, 256).isnan().any(dim=1).tolist() == [False, True, False, False]
        assert moment.view(4, 256)[1].isnan().all()
    p.data.fill_(1.0)
    p.grad = torch.randn(4, 256)
    optimizer.step()
    assert p.isnan().any(dim=1).tolist() == [False, True, False, False]


def test_sign_of_zero_is_zero():
    p = torch.nn.Parameter(torch.ones(4, 4))
    q = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = Frugal([p, q], lr=0.1, density=0.0)
    p.grad, q.grad = torch.zeros(4, 4), torch.ones(4, 4)
    optimizer.step()
    assert torch.equal(p, torch.ones(4, 4))
    assert torch.allclose(q, torch.full((4, 4), 0.9))
