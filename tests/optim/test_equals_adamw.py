"""Density 1 is torch's AdamW to the bit; density 0 with sign is signSGD."""

from __future__ import annotations

import pytest
import torch

from memopt.optim import Frugal, execute

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


def odd_parameters(dtype):
    """Parameters of no elements, no dimensions, and no contiguous memory."""
    torch.manual_seed(0)
    base = torch.randn(40, 40).to(dtype)
    values = [
        torch.randn(s).to(dtype) for s in ((), (0,), (0, 5), (5, 0), (1,), (70_000,), (513, 129))
    ]
    values += [
        torch.randn(6, 5, 4, 4).to(dtype).to(memory_format=torch.channels_last),
        torch.randn(2, 3, 4, 5, 6).to(dtype).to(memory_format=torch.channels_last_3d),
        torch.randn(17, 13).to(dtype).T, base[3:17, 5:22], base[20:, ::3],
    ]  # fmt: skip
    params = [torch.nn.Parameter(value) for value in values]
    assert sum(not p.is_contiguous() for p in params) == 5
    return params


@pytest.mark.parametrize("tile", [None, 1 << 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("selection", ["blocks", "columns", "rows", "coordinates", "randperm"])
def test_density_one_is_bitwise_adamw_for_odd_parameters(monkeypatch, selection, dtype, tile):
    if tile:
        monkeypatch.setattr(execute, "CPU_TILE", tile)
    ours, theirs = odd_parameters(dtype), odd_parameters(dtype)
    frugal = Frugal(
        ours, lr=1e-2, weight_decay=0.1, density=1.0, update_gap=2, selection=selection,
        impl="foreach" if tile else "reference",
    )  # fmt: skip
    adamw = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, foreach=True)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            grad = torch.randn(a.shape, generator=generator).to(dtype)
            a.grad, b.grad = (torch.empty_like(p).copy_(grad) for p in (a, b))
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
