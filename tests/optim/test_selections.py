"""Selections are exact, disjoint over tiles, pure functions, and leave global generators alone."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.ops.counter_rng import key_of
from memopt.optim.parts import Part
from memopt.optim.selections import Choice, selection_named, selection_names
from memopt.optim.selections.blocks import block_order, fill_budget
from memopt.optim.tensors import share

INDEXED = ("blocks", "columns", "rows", "coordinates", "randperm")
CPU = torch.device("cpu")
shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))
densities = st.floats(0.0, 1.0)


def choose(name, shape, density, seed=0, round_=0, who="w", grad=None) -> Part:
    choice = Choice(seed=seed, round=round_, name=who, rows=shape[0], columns=shape[1],
                    density=density, device=CPU, grad=grad)  # fmt: skip
    return selection_named(name).choose(choice)


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(INDEXED), shape=shapes, density=densities, seed=st.integers(0, 2**63),
       round_=st.integers(0, 10**6), limit=st.one_of(st.none(), st.integers(1, 300)),
       align=st.sampled_from([1, 4]))  # fmt: skip
def test_tiles_cover_every_element_once_and_slots_in_order(
    name, shape, density, seed, round_, limit, align
):
    rows, columns = shape
    part = choose(name, shape, density, seed, round_)
    count = torch.zeros(shape)
    owner = torch.arange(rows * columns, dtype=torch.float64).view(shape)
    slots = []
    for tile in part.tiles(count, owner, limit, align):
        tile.weight.add_(1)
        assert tile.slot % align == 0 or tile.num_slots == 0
        if tile.cut.has_full:
            chosen = tile.cut.gather(tile.grad)
            assert chosen.numel() == tile.num_slots
            assert tile.slot == len(slots)
            slots += chosen.reshape(-1).tolist()
            if tile.cut.has_free:
                assert not set(tile.cut.complement(tile.grad).reshape(-1).tolist()) - {0.0} & set(
                    slots
                )
    assert bool((count == 1).all())
    assert len(slots) == part.num_slots == len(set(slots))
    mask = part.mask(rows, columns)
    assert sorted(slots) == sorted(owner[mask].tolist())


@settings(deadline=None, max_examples=80)
@given(name=st.sampled_from(INDEXED), shape=shapes, density=densities)
def test_budget_is_exact(name, shape, density):
    rows, columns = shape
    found = choose(name, shape, density).num_slots
    exact = {
        "columns": rows * math.floor(density * columns + 1e-9),
        "rows": columns * math.floor(density * rows + 1e-9),
        "coordinates": math.floor(density * rows * columns + 1e-9),
    }
    exact["randperm"] = exact["columns"] if rows >= columns else exact["rows"]
    if name == "blocks":
        assert density * rows * columns - columns <= found <= density * rows * columns + 1e-6
    else:
        assert found == exact[name]
    assert found <= density * rows * columns + 1e-6
    assert found == selection_named(name).num_slots(rows, columns, density) or name == "blocks"


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(shapes, min_size=1, max_size=12), density=densities, seed=st.integers(0, 999),
       round_=st.integers(0, 60),
       order=st.sampled_from(["random", "ascending", "descending", "mirror"]))  # fmt: skip
def test_blocks_fill_the_budget_to_within_one_row(sizes, density, seed, round_, order):
    elements = [a * b for a, b in sizes]
    budget = share(density, sum(elements))
    names = [str(i) for i in range(len(sizes))]
    sequence = block_order(names, elements, budget, order=order, seed=seed, round_=round_)
    assert sorted(sequence) == list(range(len(sizes)))
    full_rows = fill_budget(sequence, sizes, budget)
    used = sum(rows * b for rows, (_, b) in zip(full_rows, sizes, strict=True))
    assert used <= budget
    assert budget - used < max(b for _, b in sizes)
    cut = [i for i, rows in enumerate(full_rows) if 0 < rows < sizes[i][0]]
    assert len(cut) <= 1  # all others are whole or without state


def test_ascending_sweeps_through_all_tensors():
    sizes, budget = [64] * 12, 3 * 64
    names = [str(i) for i in range(12)]

    def first(order, round_):
        return block_order(names, sizes, budget, order=order, seed=0, round_=round_)[:3]

    assert [first("ascending", r) for r in range(5)] == [
        [0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [0, 1, 2],
    ]  # fmt: skip
    assert first("descending", 0) == [11, 10, 9]
    assert [first("mirror", r)[0] for r in range(8)] == [0, 3, 6, 9, 11, 8, 5, 2]


@settings(deadline=None, max_examples=40)
@given(name=st.sampled_from((*INDEXED, "svd", "random")), seed=st.integers(0, 2**40),
       round_=st.integers(0, 9), who=st.text(max_size=8))  # fmt: skip
def test_pure_function_that_leaves_the_global_generator_alone(name, seed, round_, who):
    shape = (24, 18)
    grad = torch.arange(24.0 * 18).view(shape).sin()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = choose(name, shape, 0.4, seed, round_, who, grad)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    second = choose(name, shape, 0.4, seed, round_, who, grad)
    if selection_named(name).low_rank:
        assert torch.equal(first.basis, second.basis)
    else:
        assert torch.equal(first.mask(*shape), second.mask(*shape))


@pytest.mark.parametrize("name", ["columns", "rows", "coordinates", "random"])
def test_draws_differ_by_seed_round_and_name(name):
    def drawn(**keys):
        part = choose(name, (40, 40), 0.3, **keys)
        return part.basis if name == "random" else part.mask(40, 40)

    base = drawn()
    for keys in ({"seed": 1}, {"round_": 1}, {"who": "v"}):
        assert not torch.equal(base, drawn(**keys))


@pytest.mark.parametrize("name", ["columns", "rows", "coordinates"])
def test_every_element_is_drawn_equally_often(name):
    rounds, density, shape = 2000, 0.3, (10, 20)
    counts = sum(choose(name, shape, density, round_=r).mask(*shape).float() for r in range(rounds))
    k = choose(name, shape, density).num_slots / 200
    spread = 5 * math.sqrt(k * (1 - k) / rounds)
    inner = (counts / rounds).view(-1)
    if name == "coordinates":  # the first and last stratum have varying lengths
        inner = inner[6:-6]
    assert (inner - k).abs().max() < spread


def test_vectors_under_a_matrix_selection_use_coordinates():
    for name in selection_names():
        expected = name if name in ("blocks", "coordinates") else "coordinates"
        assert selection_named(name, 1).name == expected


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (16, 16)])
def test_low_rank_sides_and_sizes(shape):
    grad = torch.randn(shape)
    for name in ("svd", "random"):
        part = choose(name, shape, 0.33, grad=grad)
        rank = round(0.33 * min(shape))
        assert part.basis.shape == (rank, min(shape))
        assert part.left == (shape[0] < shape[1])
        selection = selection_named(name)
        assert selection.num_slots(*shape, 0.33) == part.num_slots == rank * max(shape)
        assert selection.num_basis(*shape, 0.33) == rank * min(shape)


def test_a_choice_in_another_round_is_that_rounds_choice():
    first = Choice(seed=3, round=0, name="w", rows=40, columns=9, density=0.3, device=CPU)
    later = first.in_round(7)
    assert later == dataclasses.replace(first, round=7)
    assert (first.round, later.key) == (0, key_of(3, 7, "w"))
