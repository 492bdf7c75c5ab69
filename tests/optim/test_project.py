"""`on_switch="project"`: what stays chosen keeps its moments and, under blocks, its counter."""

from __future__ import annotations

import pytest
import torch

from memopt.optim import Frugal
from memopt.optim.selections import coordinates
from memopt.optim.selections.axes import carry_chosen
from tests.optim.test_state_bytes import LiveBytes


def moments(optimizer, p):
    """Return (mask, m, v) of a parameter, scattered to its shape, from the arena."""
    bucket, i = optimizer._groups[0].home[p]
    part, offset = bucket.parts[i], bucket.offsets[i]
    m, v = bucket.arena.load(offset, offset + part.num_slots, torch.float32)
    mask = part.mask(*p.shape)
    full_m, full_v = torch.zeros(p.shape), torch.zeros(p.shape)
    full_m[mask], full_v[mask] = m.clone(), v.clone()
    return mask, full_m, full_v


@pytest.mark.parametrize("quantize", [None, "8bit"])
@pytest.mark.parametrize(("selection", "order"), [
    ("blocks", "random"), ("blocks", "ascending"), ("columns", "random"), ("rows", "random"),
    ("coordinates", "random"),
])  # fmt: skip
def test_what_stays_chosen_keeps_its_moments(selection, order, quantize):
    torch.manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(s))
        for s in [(16, 32), (32, 16), (8, 64), (64, 24), (30, 10)]
    ]
    optimizer = Frugal(params, density=0.5, selection=selection, update_gap=3, lr=0.0, order=order,
                       on_switch="project", quantize=quantize, betas=(0.0, 0.0))  # fmt: skip
    kept_some = False
    for call in range(13):
        if call and call % 3 == 0:
            before = [moments(optimizer, p) for p in params]
            steps = [optimizer.state[p]["step"] for p in params]
            optimizer._groups[0].begin_call()  # the switch alone
            for p, (mask, m, v), step in zip(params, before, steps, strict=True):
                new_mask, new_m, new_v = moments(optimizer, p)
                both = mask & new_mask
                kept_some |= bool(both.any())
                if quantize is None:
                    assert torch.equal(new_m[both], m[both])
                    assert torch.equal(new_v[both], v[both])
                else:
                    torch.testing.assert_close(new_m[both], m[both], rtol=0.05, atol=1e-3)
                assert not new_m[new_mask & ~mask].any()
                assert not new_v[new_mask & ~mask].any()
                if selection == "blocks":
                    assert optimizer.state[p]["step"] == (step if mask.any() else 0)
                else:
                    assert optimizer.state[p]["step"] == step
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert kept_some


@pytest.mark.parametrize("densities", [(1.0, 0.5), (0.5, 1.0), (0.5, 0.3), (0.0, 0.5), (0.5, 0.0)])
@pytest.mark.parametrize("selection", ["blocks", "columns", "rows", "coordinates"])
def test_what_stays_chosen_is_carried_when_the_density_changes(selection, densities):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s)) for s in [(12, 10), (10, 14), (9, 9)]]
    optimizer = Frugal(params, density=densities[0], arena_density=1.0, selection=selection, lr=0.0,
                       update_gap=2, on_switch="project", betas=(0.0, 0.0))  # fmt: skip
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    before = [moments(optimizer, p) for p in params]
    optimizer.param_groups[0]["density"] = densities[1]
    optimizer._groups[0].begin_call()
    kept = 0
    for p, (mask, m, v) in zip(params, before, strict=True):
        new_mask, new_m, new_v = moments(optimizer, p)
        both = mask & new_mask
        kept += int(both.sum())
        assert torch.equal(new_m, torch.where(both, m, 0.0))
        assert torch.equal(new_v, torch.where(both, v, 0.0))
    assert (kept > 0) == (min(densities) > 0.0)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_subspaces_rotate(shape):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(shape))
    optimizer = Frugal([p], density=0.5, selection="svd", update_gap=2, on_switch="project", lr=0.0,
                       betas=(0.5, 0.5))  # fmt: skip
    for _ in range(2):
        p.grad = torch.randn(shape)
        optimizer.step()
    bucket, i = optimizer._groups[0].home[p]
    old = bucket.parts[i].basis.clone()
    m, v = (x.clone().view(20, 6) for x in bucket.arena.load(0, 120, torch.float32))
    p.grad = torch.randn(shape)
    optimizer.step()  # switches, then updates once
    new = bucket.parts[i].basis
    rotation = new @ old.T
    g = (p.grad if shape[0] >= shape[1] else p.grad.T) @ new.T
    expected_m = 0.5 * (m @ rotation.T) + 0.5 * g
    expected_v = 0.5 * (v @ rotation.square().T) + 0.5 * g * g
    found_m, found_v = (x.view(20, 6) for x in bucket.arena.load(0, 120, torch.float32))
    torch.testing.assert_close(found_m, expected_m, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found_v, expected_v, rtol=1e-4, atol=1e-5)
    assert (found_v >= 0).all()


def test_keep_leaves_moments_where_they_lie():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(20, 12))
    optimizer = Frugal([p], density=0.5, selection="svd", update_gap=1, on_switch="keep", lr=0.0)
    previous = torch.zeros(120)
    for _ in range(4):
        p.grad = torch.randn(20, 12)
        optimizer.step()
        bucket, i = optimizer._groups[0].home[p]
        g = (p.grad @ bucket.parts[i].basis.T).reshape(-1)
        expected = 0.9 * previous + 0.1 * g
        previous = bucket.arena.arrays["exp_avg"].clone()
        torch.testing.assert_close(previous, expected, rtol=1e-4, atol=1e-6)
    assert optimizer.state[p]["step"] == 4


def test_reset_restarts_moments_and_counters_also_of_what_stays():
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(8, 8)) for _ in range(3)]
    optimizer = Frugal(params, density=0.7, update_gap=2)
    for call in range(6):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        assert {optimizer.state[p]["step"] for p in params} == {call % 2 + 1}


def test_a_parameter_without_a_gradient_keeps_its_basis():
    torch.manual_seed(0)
    a, b = (torch.nn.Parameter(torch.randn(8, 8)) for _ in range(2))
    optimizer = Frugal([a, b], density=0.5, selection="svd", update_gap=2)
    for call in range(5):
        a.grad = torch.randn(8, 8)
        b.grad = torch.randn(8, 8) if call != 2 else None
        old = [optimizer.state[p]["basis"].clone() for p in (a, b)] if call else None
        optimizer.step()
        if call in (2, 3):
            assert torch.equal(optimizer.state[b]["basis"], old[1])
            assert torch.equal(optimizer.state[a]["basis"], old[0]) == (call == 3)
        if call == 4:
            assert not torch.equal(optimizer.state[b]["basis"], old[1])


@pytest.mark.parametrize(("shape", "dim"), [((5,), 0), ((5, 3), 0), ((3, 5), 1)])
def test_carrying_needs_no_look_at_the_device(shape, dim):
    """Where a size depends on values, a GPU is waited for; tensors without data have no such sizes."""
    old, new = torch.tensor([1, 4, 6, 7, 9]), torch.tensor([0, 4, 7, 8, 9, 11])
    moment = torch.randn(shape)
    moment.view(-1)[-1] = float("inf")  # of 9: what is not carried is 0 all the same
    carried = carry_chosen(old, new, moment, dim)
    for at, number in enumerate(new.tolist()):
        was = (old == number).nonzero().view(-1)
        entry = carried.select(dim, at)
        assert entry.equal(moment.select(dim, int(was)) if was.numel() else torch.zeros_like(entry))
    on_meta = carry_chosen(old.to("meta"), new.to("meta"), moment.to("meta"), dim)
    assert on_meta.shape == carried.shape


@pytest.mark.parametrize("counts", [(250, 250), (250, 90), (90, 250), (1, 250), (999, 1), (7, 998)])
@pytest.mark.parametrize("run", [1, 7, 1000])
def test_strata_are_carried_run_by_run(monkeypatch, counts, run):
    """As if all indices were compared at once."""
    monkeypatch.setattr(coordinates, "CARRIED", run)
    for key in range(5):
        old, new = (
            coordinates.Strata(10 * key + i, 1000, count, torch.device("cpu"))
            for i, count in enumerate(counts)
        )
        every = old.index(0, old.count)
        assert [old.stratum_of(element) for element in every.tolist()] == list(range(old.count))
        moment = torch.rand(old.count) + 1.0
        wanted = torch.zeros(1000).index_copy_(0, every, moment)
        carried = new.carry(old, moment, signed=True)
        assert carried.equal(wanted[new.index(0, new.count)])


def test_carrying_strata_takes_the_memory_of_a_run(monkeypatch):
    monkeypatch.setattr(coordinates, "CARRIED", 1 << 12)
    old, new = (coordinates.Strata(i, 1 << 20, 1 << 18, torch.device("cpu")) for i in range(2))
    moment = torch.rand(old.count)
    with LiveBytes() as counter:
        new.carry(old, moment, signed=True)
    over = counter.peak - 4 * (old.count + new.count)  # the moments themselves
    assert 0 < over < 150 * (1 << 12)  # indices: 8 bytes, several of them
