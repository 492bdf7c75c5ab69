"""The limits of sizes, shapes and numbers: refused with their reason before anything changes."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from memopt.optim import Frugal, native
from memopt.optim.selections import Choice, selection_named
from tests.optim.test_hard_use import pair
from tests.optim.test_optimizer_contract import grads_of, same


def test_tensors_beyond_the_index_arithmetic_are_refused_with_their_size():
    selection = selection_named("coordinates", 2)

    def choose(rows, columns, density):
        choice = Choice(
            seed=1, round=0, name="w", rows=rows, columns=columns, density=density,
            device=torch.device("cpu"),
        )  # fmt: skip
        return selection.choose(choice)

    part = choose(1_500_000, 4000, 0.25)  # 6 billion elements: the products still fit 63 bits
    near_end = part.index(part.count - 3, part.count)
    assert 6 * 10**9 - 20 < int(near_end[0]) < int(near_end[-1]) < 6 * 10**9
    with pytest.raises(ValueError, match=r"8000000000 elements at density 0\.25"):
        choose(2_000_000, 4000, 0.25)
    with pytest.raises(ValueError, match="at density 5e-10"):
        choose(2_000_000, 2000, 5e-10)


@pytest.mark.parametrize(
    ("size", "density", "fits"),
    [(2**30, 0.25, True), (9 * 10**9, 0.25, False), (10**8, 1e-7, False), (10**8, 0.0, True)],
)
def test_the_kernel_refuses_strata_that_do_not_fit_32_bits(size, density, fits):
    entry = SimpleNamespace(size=size, selection=selection_named("coordinates", 1))
    found = native._too_large(SimpleNamespace(entries=[entry]), density)
    assert found == (0 if fits else size)


@pytest.mark.parametrize("impl", ["foreach", "reference"])
def test_a_parameter_that_was_resized_is_refused(impl):
    weight = torch.nn.Parameter(torch.randn(8, 8))
    optimizer = Frugal([weight], lr=0.1, density=0.5, impl=impl)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    weight.grad, weight.data = None, torch.randn(4, 4)
    weight.grad = torch.ones(4, 4)
    with pytest.raises(ValueError, match="has 16 elements, its state was made for 64"):
        optimizer.step()


def test_a_partial_step_takes_a_parameter_once():
    weight = torch.nn.Parameter(torch.ones(8, 8))
    optimizer = Frugal([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match="twice"):
        optimizer.step_partial([weight, weight])
    assert bool((weight == 1.0).all())


def test_a_partial_step_that_fails_leaves_the_step_to_be_ended():
    (params, optimizer), (others, plain) = pair(update_gap=2)
    for step in range(5):
        for p, q, grad in zip(params, others, grads_of(step), strict=True):
            p.grad, q.grad = grad.clone(), grad
        matrix = next(p for p in params if p.dim() == 2)
        rest = [p for p in params if p is not matrix]
        optimizer.step_partial(rest[:2])
        kept, matrix.grad = matrix.grad, None
        matrix.grad = kept.to_sparse()
        with pytest.raises((ValueError, RuntimeError), match="sparse"):
            optimizer.step_partial([matrix])
        with pytest.raises(ValueError, match="once"):
            optimizer.step_partial([rest[0]])
        matrix.grad = kept
        optimizer.step()
        plain.step()
        assert same(params, others)


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay", "state_free_lr_scale"])
@pytest.mark.parametrize("value", [math.inf, math.nan, -1.0, "0.1", None])
def test_numbers_that_are_none_are_refused_with_their_name(name, value):
    with pytest.raises(ValueError, match=name):
        Frugal([torch.nn.Parameter(torch.ones(2))], **{"lr": 0.1, name: value})


@pytest.mark.parametrize("on_switch", ["reset", "project"])
@pytest.mark.parametrize("selection", ["svd", "random"])
@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (1, 1), (3, 5), (0, 5)])
def test_a_subspace_of_rank_0_survives_a_load(shape, selection, on_switch):
    torch.manual_seed(0)
    first = torch.nn.Parameter(torch.randn(shape))
    sides = []
    for weight in (first, torch.nn.Parameter(first.detach().clone())):
        optimizer = Frugal([weight], lr=0.1, selection=selection, density=0.15, update_gap=3,
                           on_switch=on_switch)  # fmt: skip
        sides.append((weight, optimizer))
    for _ in range(8):
        grad = torch.randn(shape)
        for weight, optimizer in sides:
            weight.grad = grad.clone()
            optimizer.step()
        assert torch.equal(sides[0][0], sides[1][0])
        sides[1][1].load_state_dict(copy.deepcopy(sides[1][1].state_dict()))
    assert sides[1][1].state_bytes() == sides[0][1].state_bytes()


def test_float16_is_stepped_in_float32():
    """In float16 eps is 0 and the square of a small gradient, too: the step would be infinite."""
    for impl in ("reference", "foreach"):
        weight = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.float16))
        optimizer = Frugal([weight], lr=1e-2, density=1.0, impl=impl)
        exact = weight.detach().double()
        for _ in range(1, 4):
            weight.grad = torch.full_like(weight, 1e-3)
            optimizer.step()
            exact = exact - 1e-2
        assert weight.isfinite().all()
        assert (weight.double() - exact).abs().max() < 2e-2  # the stored squares are still 0
