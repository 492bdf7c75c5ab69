"""The kernel's tables, run through the operator's PyTorch reference on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memopt.ops.counter_rng import random_subset
from memopt.ops.frugal_step import CHUNK
from memopt.optim import Frugal, native

SHAPES = [(96, 256), (33, 20), (16, 512), (30,), (4, 3, 5), (70, 300), ()]


@pytest.fixture
def native_on_cpu(monkeypatch):
    """Take the kernel's path with the operator's CPU implementation behind it."""
    kept = native.refusal

    def refusal(*arguments):
        reason = kept(*arguments)
        return "" if reason == "the parameters are on cpu" else reason

    monkeypatch.setattr(native, "refusal", refusal)


def pair(dtype, **settings):
    torch.manual_seed(0)
    sides = []
    start = [torch.randn(shape, dtype=torch.float32).to(dtype) for shape in SHAPES]
    for impl in ("native", "reference"):
        params = [torch.nn.Parameter(value.clone()) for value in start]
        sides.append((params, Frugal(params, lr=1e-2, weight_decay=0.1, impl=impl, **settings)))
    return sides


def run_both(sides, steps=8, generator=None):
    generator = generator or torch.Generator().manual_seed(5)
    for _ in range(steps):
        for a, b in zip(sides[0][0], sides[1][0], strict=True):
            a.grad = torch.randn(a.shape, generator=generator).to(a.dtype)
            b.grad = a.grad.clone()
            b.data.copy_(a.data)  # update by update, from the same weights
        for _, optimizer in sides:
            optimizer.step()
        yield


@pytest.mark.parametrize("on_switch", ["reset", "project"])
@pytest.mark.parametrize("full", ["adamw", "lion", "sgdm"])
@pytest.mark.parametrize("selection", ["blocks", "columns", "rows", "coordinates", "randperm"])
def test_tables_say_what_the_reference_does(native_on_cpu, selection, full, on_switch):
    sides = pair(
        torch.float32, selection=selection, state_full=full, update_gap=3, density=0.3,
        on_switch=on_switch,
    )  # fmt: skip
    for _ in run_both(sides):
        for a, b in zip(sides[0][0], sides[1][0], strict=True):
            assert (a - b).detach().abs().max() <= 2e-6 * max(1.0, float(b.detach().abs().max()))


@pytest.mark.parametrize("selection", ["blocks", "columns", "rows", "coordinates"])
def test_tables_follow_a_density_that_changes(native_on_cpu, selection):
    sides = pair(torch.float32, selection=selection, update_gap=2, density=0.5)
    densities = iter([0.5, 0.2, 0.2, 0.0, 0.0, 0.5, 0.35, 0.35, 1 / 3, 1 / 3])
    for _ in run_both(sides, steps=9):
        for a, b in zip(sides[0][0], sides[1][0], strict=True):
            assert (a - b).detach().abs().max() <= 2e-6 * max(1.0, float(b.detach().abs().max()))
        density = next(densities)
        for _, optimizer in sides:
            optimizer.param_groups[0]["density"] = density


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("selection", ["blocks", "columns", "rows", "coordinates"])
def test_low_precision_weights_are_the_same_bits(native_on_cpu, selection, rounding):
    sides = pair(torch.bfloat16, selection=selection, rounding=rounding, update_gap=3, density=0.3)
    different = total = 0
    for _ in run_both(sides):
        for a, b in zip(sides[0][0], sides[1][0], strict=True):
            # float32 arithmetic in another order may cross a rounding boundary now and then
            different += int((a != b).sum())
            total += a.numel()
            torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-4)
    assert different < 0.01 * total


def test_quantized_blocks_agree(native_on_cpu):
    sides = pair(torch.float32, selection="blocks", quantize="8bit", update_gap=3, density=0.5)
    for _ in run_both(sides):
        for a, b in zip(sides[0][0], sides[1][0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-3)
    ours, theirs = [optimizer._groups[0].buckets[0].arena.arrays for _, optimizer in sides]
    for name in ours:
        if name.endswith("_scale"):
            torch.testing.assert_close(ours[name], theirs[name], rtol=0.05, atol=1e-6)
        else:
            near = (ours[name].view(torch.int8) - theirs[name].view(torch.int8)).abs() <= 1
            assert near.float().mean() > 0.98, name


def test_partial_steps_use_tables_of_their_own(native_on_cpu):
    sides = pair(torch.float32, selection="blocks", update_gap=3, density=0.3)
    generator = torch.Generator().manual_seed(5)
    for _ in range(7):
        for a, b in zip(sides[0][0], sides[1][0], strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        params, optimizer = sides[0]
        optimizer.step_partial(params[:3])
        optimizer.step_partial(params[3:5])
        optimizer.step()
        sides[1][1].step()
    for a, b in zip(sides[0][0], sides[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_tables_keep_their_shape_and_address_over_switches(native_on_cpu):
    p = torch.nn.Parameter(torch.randn(40, CHUNK // 16))
    q = torch.nn.Parameter(torch.randn(30, CHUNK // 16))
    optimizer = Frugal([p, q], update_gap=1, impl="native", density=0.3)
    seen = set()
    for _ in range(6):
        p.grad, q.grad = torch.randn_like(p), torch.randn_like(q)
        optimizer.step()
        (tables,) = optimizer._groups[0].buckets[0].tables.values()
        seen.add((tables.segments.data_ptr(), tables.chunks.data_ptr(), tables.chunks.numel()))
    assert len(seen) == 1


def test_a_switch_draws_in_the_kernel_and_makes_indices_on_demand(native_on_cpu, monkeypatch):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((64, 48), (64, 48), (7, 96))]
    optimizer = Frugal(params, selection="randperm", update_gap=1, impl="native", density=0.3)
    drawn, kept = [], native._draw
    monkeypatch.setattr(native, "_draw", lambda *given: drawn.append(1) or kept(*given))
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    (bucket,) = optimizer._groups[0].buckets
    assert len(drawn) == 3
    assert not any("indices" in vars(part.draw) for part in bucket.parts)
    for p, part in zip(params, bucket.parts, strict=True):
        chosen = random_subset(part.key, part.draw.size, part.draw.count, p.device)
        lines = optimizer.state_full_mask(p).all(dim=0 if p.shape[0] >= p.shape[1] else 1)
        assert lines.nonzero().view(-1).equal(chosen)
    assert bucket.parts[0].draw is bucket.parts[1].draw  # one sort where PyTorch draws


class Operations(TorchDispatchMode):
    """Notes what PyTorch is asked to do."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("selection", ["blocks", "columns", "rows", "coordinates"])
def test_a_switch_gives_pytorch_zeroing_and_copies_only(native_on_cpu, selection):
    """Each operation more is a launch, or host work that PyTorch shares among its threads."""
    params = [torch.nn.Parameter(torch.randn(3 + i % 5, CHUNK // 2)) for i in range(40)]
    # of blocks, another tensor is cut in two in each round: all tables change
    optimizer = Frugal(params, selection=selection, update_gap=1, impl="native", density=0.26)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.step()
    with Operations() as operations:
        optimizer.step()
    assert optimizer.param_groups[0]["round"] == 2
    work = {"zero_": 2, "copy_": 2, "frugal_draw": 1, "frugal_step": 1}
    free = {"view", "lift_fresh", "_record_function_enter_new", "_record_function_exit"}
    done = [name for name in operations.names if name not in free]
    assert all(done.count(name) <= work.get(name, 0) for name in done), done
