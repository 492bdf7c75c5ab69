"""Density 1 is torch's AdamW to the bit; density 0 with sign is signSGD."""

from __future__ import annotations

import pytest
import torch

from memopt.optim import Frugal

SHAPES = [(33, 20), (16, 41), (37,), (4, 3, 5), (129, 7)]


def two_copies(dtype):
    torch.manual_seed(0)
    first = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    return first, [torch.nn.Parameter(p.detach().clone()) for p in first]


@pytest.mark.parametrize("impl", ["reference", "foreach"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("selection", ["blocks", "columns", "rows", "coordinates", "randperm"])
def test_density_one_is_bitwise_adamw(selection, dtype, impl):
    ours, theirs = two_copies(dtype)
    frugal = Frugal(
        ours, lr=1e-2, weight_decay=0.1, density=1.0, update_gap=3, selection=selection, impl=impl
    )
    adamw = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, foreach=True)
    generator = torch.Generator().manual_seed(3)
    for _ in range(10):
        for a, b in zip(ours, theirs, strict=True):
            b.grad = a.grad = torch.randn(a.shape, generator=generator).to(dtype)
        frugal.step()
        adamw.step()
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_that_are_not_split_are_adamw(dtype):
    ours, theirs = two_copies(dtype)
    frugal = Frugal(
        [{"params": ours, "split": False}], lr=1e-2, weight_decay=0.1, update_gap=2,
        state_full_lr_scale=0.1, state_free_lr_scale=5.0,
    )  # fmt: skip
    adamw = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, foreach=True)
    for _ in range(7):
        for a, b in zip(ours, theirs, strict=True):
            b.grad = a.grad = torch.randn(a.shape).to(dtype)
        frugal.step()
        adamw.step()
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("selection", ["blocks", "columns", "coordinates", "svd"])
def test_density_zero_is_sign_sgd(selection):
    ours, theirs = two_copies(torch.float32)
    frugal = Frugal(ours, lr=1e-2, weight_decay=0.1, density=0.0, selection=selection, update_gap=2)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            with torch.no_grad():
                b.mul_(1 - 1e-2 * 0.1).add_(a.grad.sign(), alpha=-1e-2)
        frugal.step()
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
    assert frugal.state_bytes() == 0
