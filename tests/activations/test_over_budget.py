"""A step that holds more than its plan predicted: the next plan sets that much aside, and the report says so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memopt

WIDTH, NUM_BLOCKS = 64, 8
MIB = 1 << 20


def build(width=WIDTH, num_blocks=NUM_BLOCKS):
    """A linear layer, then blocks, and the blocks' names."""
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        for _ in range(num_blocks)
    ]
    return nn.Sequential(nn.Linear(width, width), *blocks), [
        str(i) for i in range(1, num_blocks + 1)
    ]


def train(rows, **options):
    """Return per step what the device held at most, and the loss; and the session."""
    model, regions = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    peaks, losses = [], []
    generator = torch.Generator().manual_seed(1)
    with memopt.optimize(model, optimizer, regions=regions, **options) as run:
        for n in rows:
            loss = model(torch.randn(n, WIDTH, generator=generator)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            peaks.append(run._steps._step_peak_bytes or run._steps.last_step_peak_bytes)
    return peaks, losses, run


@pytest.fixture(scope="module")
def budget_bytes():
    """Between what everything recomputed takes with 6,000 rows and what the plain loop takes with 4,096."""
    least = max(train([6000] * 2, plan="recompute")[0])
    most = max(train([4096] * 2, plan="device")[0])
    assert least < 0.8 * most
    return (least + most) // 2


def test_a_larger_batch_breaks_the_budget_once(budget_bytes):
    rows = [4096, 4096, 4096, 6000, 6000, 6000, 6000]
    peaks, losses, run = train(rows, budget=memopt.Budget(device=budget_bytes))
    assert max(peaks[:3]) <= budget_bytes
    assert peaks[3] > budget_bytes, "the plan was made for 4,096 rows"
    assert max(peaks[4:]) <= budget_bytes
    assert any("more than planned; now that much is set aside" in n for n in run.report().notes)
    assert losses == train(rows, plan="device")[1]


def test_a_budget_that_no_plan_keeps_any_more_is_told(budget_bytes):
    peaks, _, run = train(
        [1024, 1024, 24_000, 24_000, 24_000], budget=memopt.Budget(device=budget_bytes // 2)
    )
    assert peaks[2] > budget_bytes // 2
    assert any("is exceeded; raise it, or make the batch" in note for note in run.report().notes)


def test_what_is_set_aside_is_predicted(budget_bytes):
    rows = [4096] * 3 + [6000] * 3
    peaks, _, run = train(rows, budget=memopt.Budget(device=budget_bytes))
    assert run.plan.predicted.device_bytes >= 0.95 * max(peaks[-2:])


def test_where_inputs_waited_in_the_traced_step_does_not_count_as_the_backwards_own(tmp_path):
    """An input that came back from SSD was counted with the backward, and once more by the plan."""
    budget = memopt.Budget(ssd=f"{tmp_path}:1GiB")
    traces = [train([4096] * 2, plan="recompute", budget=b)[2].trace for b in (None, budget)]
    kept, moved = ([region.backward_peak_bytes for region in t.regions] for t in traces)
    assert kept[1:] == moved[1:]
    assert max(kept) > 0
