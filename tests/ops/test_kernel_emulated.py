"""The CUDA kernel's own sources against the optimizer in PyTorch, without a GPU."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.bench_frugal_tiles import VARIANTS, defines_of
from memopt.ops import frugal_step as op
from memopt.ops.counter_rng import bits_at, key_of, random_bits, random_subset
from memopt.ops.frugal_draw import Lines, column_words, draw_of, frugal_draw_reference
from memopt.ops.frugal_step import CHUNK
from memopt.optim import Frugal, execute, native
from tests.ops import emulate_cuda
from tests.optim import gpu_checks

# Odd sizes, rows shorter and longer than a tile, several rows a tile, one number, vectors.
SHAPES = [(96, 256), (33, 20), (30,), (4, 3, 5), (700, 3), (1,), (64, 264), (3, 9000), (1, 5)]
INCLUDE = emulate_cuda.cuda_include()
pytestmark = pytest.mark.skipif(
    INCLUDE is None or shutil.which("g++") is None, reason="needs CUDA's headers and g++"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulate_cuda.build(tmp_path_factory.mktemp("kernel"), INCLUDE)


@pytest.fixture
def emulated(library, monkeypatch):
    """Take the kernel's path with the emulated kernel behind it; count its launches."""
    return take(library, monkeypatch)


def take(library, monkeypatch):
    kept, launches = native.refusal, []
    run, draw = emulate_cuda.step_with(library), emulate_cuda.draw_with(library)

    class Ops:
        @staticmethod
        def frugal_step(*arguments):
            launches.append(arguments)
            run(*arguments)

        frugal_draw = staticmethod(draw)

    def refusal(*arguments):
        reason = kept(*arguments)
        return "" if reason == "the parameters are on cpu" else reason

    class Torch:
        ops = type("Namespace", (), {"memopt": Ops})

        def __getattr__(self, name):
            return getattr(torch, name)

    monkeypatch.setattr(native, "refusal", refusal)
    monkeypatch.setattr(execute, "torch", Torch())
    monkeypatch.setattr(native, "torch", Torch())
    monkeypatch.setattr(op, "register", lambda: None)
    return launches


def largest_error(dtype, steps=3, **settings):
    """Return the largest |kernel - PyTorch| / max|w| and the share of weights that differ."""
    torch.manual_seed(0)
    start = [torch.randn(shape).to(dtype) for shape in SHAPES]
    sides = []
    for impl in ("native", "reference"):
        params = [torch.nn.Parameter(value.clone()) for value in start]
        sides.append((params, Frugal(params, lr=1e-2, weight_decay=0.1, impl=impl, update_gap=2,
                                     **settings)))  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    worst, different, total = 0.0, 0, 0
    for _ in range(steps):
        for a, b in zip(sides[0][0], sides[1][0], strict=True):
            a.grad = torch.randn(a.shape, generator=generator).to(dtype)
            a.grad.view(-1)[:1] = 0.0
            b.grad = a.grad.clone()
            b.data.copy_(a.data)
        for _, optimizer in sides:
            optimizer.step()
        for a, b in zip(sides[0][0], sides[1][0], strict=True):
            error = (a.detach().double() - b.detach().double()).abs()
            worst = max(worst, float(error.max() / b.detach().abs().max()))
            different += int((error > 0).sum())
            total += a.numel()
    ours, theirs = [optimizer._groups[0].buckets[0].arena.arrays for _, optimizer in sides]
    if "quantize" not in settings:
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=2**-7, atol=1e-6)
    return worst, different / total


@pytest.mark.filterwarnings("ignore:.*chooses whole tensors")  # at 0.04
@pytest.mark.parametrize("density", [0.3, pytest.param(0.9, marks=pytest.mark.slow), 0.04])
@pytest.mark.parametrize("selection", ["blocks", "columns", "rows", "coordinates"])
def test_float32(emulated, selection, density):
    worst, _ = largest_error(torch.float32, selection=selection, density=density)
    assert worst <= 1e-6
    assert len(emulated) == 3  # one launch a step


@pytest.mark.parametrize("selection", ["blocks", "columns", "rows", "coordinates"])
@pytest.mark.parametrize(
    ("full", "free"), [("lion", "sgd"), pytest.param("sgdm", "none", marks=pytest.mark.slow)]
)
def test_other_rules_uphill(emulated, selection, full, free):
    worst, _ = largest_error(
        torch.float32, selection=selection, state_full=full, state_free=free, maximize=True
    )
    assert worst <= 1e-6


@pytest.mark.parametrize("selection", ["blocks", "columns", "rows", "coordinates"])
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_bfloat16(emulated, selection, rounding):
    worst, different = largest_error(torch.bfloat16, selection=selection, rounding=rounding)
    assert worst <= 2**-7
    assert different < 0.002  # float32 arithmetic in another order may cross a rounding boundary


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_8bit(emulated, rounding):
    worst, _ = largest_error(torch.float32, quantize="8bit", rounding=rounding, density=0.4)
    assert worst <= 5e-3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "settings",
    [
        {"quantize": "8bit"},
        {"quantize": "8bit", "rounding": "stochastic", "selection": "rows"},
        {"quantize": "8bit", "state_full": "lion"},
        {"quantize": "8bit", "state_full": "sgdm", "selection": "rows"},
        {"selection": "rows"},
        {"selection": "columns"},
        {"selection": "coordinates", "state_full": "lion"},
    ],
)
def test_broken_gradients_break_the_same_weights(emulated, value, settings):
    differ, broken = gpu_checks.broken_gradients(value, device="cpu", **settings)
    assert differ == 0
    if math.isnan(value):
        assert broken >= 4
    if "quantize" in settings and settings.get("state_full") != "lion":
        assert broken >= 256  # the block's moments are broken, and said to be so


def test_8bit_moments_below_the_normal_numbers(emulated):
    """Where 1 / scale overflows, zeros are still zeros."""
    p = torch.nn.Parameter(torch.ones(1, 512))
    p.grad = torch.zeros_like(p)
    p.grad[0, ::2] = 1e-38
    optimizer = Frugal([p], quantize="8bit", density=1.0, impl="native")
    optimizer.step()
    codes = optimizer._groups[0].buckets[0].arena.arrays["exp_avg"][:512].view(torch.int8)
    assert not codes[1::2].any()
    assert (codes[::2] > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "defines", [*map(defines_of, VARIANTS), ("MEMOPT_TILE_PACKS=2", "MEMOPT_TILE_STAGES=2")]
)
def test_tiles_of_another_size_in_flight(defines, tmp_path, monkeypatch):
    take(emulate_cuda.build(tmp_path, INCLUDE, defines), monkeypatch)
    for selection in ("columns", "rows", "coordinates"):
        worst, _ = largest_error(torch.float32, selection=selection, density=0.3)
        assert worst <= 1e-6
        worst, _ = largest_error(torch.bfloat16, selection=selection, rounding="kahan")
        assert worst <= 2**-7


@pytest.mark.parametrize("selection", ["blocks", "columns", "rows", "coordinates"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_at_most_that_of_torchs_fused_adamw(emulated, selection, dtype):
    """Against float64, from the same weights and moments; here torch's kernel is that of its CPU."""
    ours, fused = gpu_checks.errors_against_float64(
        dtype, steps=6, device="cpu", shapes=((64, 128), (50, 33)), selection=selection
    )
    assert ours[0] <= 1.001 * fused[0]
    assert ours[1] <= 1.001 * fused[1]


def off_by(value, count):
    """Return a copy that begins `count` elements after an aligned address."""
    around = torch.empty(value.numel() + count, dtype=value.dtype)
    return around[count:].view(value.shape).copy_(value)


@pytest.mark.parametrize(("dtype", "settings"), [
    *[(torch.bfloat16, {"selection": name}) for name in ("blocks", "columns", "rows", "coordinates")],
    (torch.bfloat16, {"rounding": "kahan", "selection": "columns"}),
    (torch.bfloat16, {"quantize": "8bit"}),
    *[(torch.float32, {"selection": name}) for name in ("blocks", "coordinates")],
])  # fmt: skip
def test_addresses_of_any_alignment_give_the_same_bits(emulated, settings, dtype):
    """Weights and gradients that are views: only single elements can be moved then."""
    torch.manual_seed(0)
    start = [torch.randn(shape).to(dtype) for shape in SHAPES]
    sides = []
    for count in (0, 1):
        params = [torch.nn.Parameter(off_by(value, count)) for value in start]
        optimizer = Frugal(
            params, lr=1e-2, weight_decay=0.1, update_gap=2, impl="native", **settings
        )
        sides.append((count, params, optimizer))
    for step in range(3):
        for count, params, optimizer in sides:
            generator = torch.Generator().manual_seed(step)
            for p in params:
                p.grad = off_by(torch.randn(p.shape, generator=generator).to(dtype), 3 * count)
            optimizer.step()
        for a, b in zip(sides[0][1], sides[1][1], strict=True):
            assert torch.equal(a, b)


def test_a_broken_gradient_is_not_hidden(emulated):
    for selection in ("blocks", "columns", "rows", "coordinates"):
        weight = torch.nn.Parameter(torch.ones(8, 64))
        optimizer = Frugal([weight], selection=selection, density=0.5, impl="native")
        weight.grad = torch.full((8, 64), float("nan"))
        optimizer.step()
        assert weight.isnan().all(), selection


class Far:
    """A tensor as if `first` elements lay before it: the kernel takes addresses only."""

    def __init__(self, near: torch.Tensor, first: int) -> None:
        self.near, self.first, self.dtype = near, first, near.dtype

    def data_ptr(self) -> int:
        return self.near.data_ptr() - self.first * self.near.element_size()


BILLION = 10**9
# Kind, A, B, KEY, OFFSET, first element looked at: all beyond 2^31, most beyond 2^32.
FAR = {
    "runs": (op.Kind.FULL, 0, 0, 0, 0, 4 * BILLION + 9),
    "rest": (op.Kind.FREE, 0, 0, 0, 0, 4 * BILLION + 9),
    "columns": (op.Kind.COLUMNS, 500, 123, 0, 0, 4 * BILLION + 9),
    "long columns": (op.Kind.COLUMNS, 50_000, 12_345, 0, 0, 4 * BILLION + 49_000),
    "strata": (op.Kind.STRATA, 5 * BILLION, 1_230_000_007, 2**63 + 5, 3 * BILLION, 4 * BILLION + 9),
    "last strata": (op.Kind.STRATA, 5 * BILLION, 1_230_000_007, 77, BILLION, 5 * BILLION - 5000),
    "long strata": (op.Kind.STRATA, 5 * BILLION, 1_200, 77, BILLION, 3 * BILLION),
}  # fmt: skip


@pytest.mark.parametrize("case", FAR)
def test_elements_beyond_32_bits(library, case):
    kind, a, b, key, offset, first = FAR[case]
    shown = 5000
    assert shown <= CHUNK
    index = torch.zeros(2, dtype=torch.int32) if kind > op.Kind.FULL else None
    if kind == op.Kind.COLUMNS:
        chosen = torch.randperm(a, generator=torch.Generator().manual_seed(0))[:b].sort().values
        index = column_words(chosen.unsqueeze(0), a)[0].contiguous()
    if case == "long strata":  # where one's element is
        begin, bits = (700 * a + offset) // b, bits_at(key, 700)
        first = begin + (bits * ((701 * a + offset) // b - begin) >> 32) - 100
    key -= 2**64 if key >= 2**63 else 0
    segment = [
        0,
        int(kind),
        first,
        shown,
        7 if kind != op.Kind.FULL else first,
        0,
        7,
        1,
        a,
        b,
        key,
        offset,
    ]
    slots = op.slots_of(segment, index, torch.device("cpu"))
    has = slots >= 0
    base = int(slots[has].min()) - 16 if has.any() else 0
    arena = torch.full((int(slots[has].max()) - base + 16 if has.any() else 1,), -1.0)
    weight, grad = torch.randn(shown), torch.rand(shown) + 1.0
    before = weight.clone()
    choices = [2, 0, 0, 0, 0, 0]  # sgdm, sign
    emulate_cuda.step_with(library)(
        [Far(weight, first)], [Far(grad, first)], [Far(arena, base)], [], torch.tensor([segment]),
        torch.zeros(1, dtype=torch.int32), index, [0.5], [1.0], [0.0, 0.25, 1.0, 0.0, 0.0], choices, None,
    )  # fmt: skip
    assert torch.equal(arena[slots[has] - base], grad[has])  # beta1 = 0: the moment is the gradient
    assert int((arena != -1.0).sum()) == int(has.sum())
    expected = before - torch.where(has, 0.5 * grad, torch.full_like(grad, 0.25))
    torch.testing.assert_close(weight, expected)
    assert (kind == op.Kind.FREE) == (not has.any())


def drawn(library, draws, threads=64):
    """Draw (key, size, count, lines) one behind the other, with space between; return both sides."""
    flat, position = [], 2
    for key, size, count, lines in draws:
        flat += draw_of(key, size, count, lines, position)
        position += 2 * (size + 2)
    sides = []
    for draw in (emulate_cuda.draw_with(library, threads), frugal_draw_reference):
        index = torch.full((position,), -7, dtype=torch.int32)
        draw(index, flat)
        sides.append(index)
    return sides


def one_draw(size):
    key = st.integers(0, 2**64 - 1)
    return st.tuples(key, st.just(size), st.integers(1, size - 1), st.sampled_from(list(Lines)))


@settings(deadline=None, max_examples=60)
@given(
    draws=st.lists(st.integers(2, 700).flatmap(one_draw), min_size=1, max_size=4),
    threads=st.sampled_from([32, 64, 96]),
)
def test_a_draw_is_the_sorted_one_to_the_bit(library, draws, threads):
    ours, theirs = drawn(library, draws, threads)
    assert torch.equal(ours, theirs)


SIZES = [(2, 1), (32, 1), (32, 31), (33, 32), (1000, 999), (5000, 1), (4096, 1024), (8192, 2048)]


@pytest.mark.parametrize("lines", list(Lines))
def test_draws_of_many_sizes(library, lines):
    draws = [(977 * i, size, count, lines) for i, (size, count) in enumerate(SIZES)]
    ours, theirs = drawn(library, draws)
    assert torch.equal(ours, theirs)
    assert int((ours != -7).sum()) > sum(count for _, count in SIZES)


@pytest.mark.slow
def test_a_draw_of_a_whole_vocabulary(library):
    draws = [(key, 128_256 + key, 32_064, lines) for key, lines in enumerate(Lines)]
    ours, theirs = drawn(library, draws, threads=128)
    assert torch.equal(ours, theirs)


def equal_hashes(key, most):
    """Return two lines below `most` with one hash (31 bits), and how many lines come before both."""
    hashes = random_bits(key, torch.arange(most)).bitwise_right_shift(1)
    ordered, lines = hashes.sort(stable=True)
    twice = (ordered[1:] == ordered[:-1]).nonzero().view(-1)
    return [(int(lines[i]), int(lines[i + 1]), int(i)) for i in twice]


def test_of_lines_with_one_hash_the_first_is_drawn(library):
    size = 3000  # one key in some five hundred gives two of these one hash
    key = next(key for key in map(key_of, range(20_000)) if equal_hashes(key, size))
    first, second, before = equal_hashes(key, size)[0]
    chosen = random_subset(key, size, before + 1, torch.device("cpu"))
    assert (chosen == first).any()
    assert not (chosen == second).any()
    ours, theirs = drawn(library, [(key, size, before + 1, Lines.ROWS)])
    assert torch.equal(ours, theirs)
