"""What a real session reports as written is what its engine wrote, but for the measuring of the disk."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import memopt
from memopt.memory import link
from memopt.types.report import SECONDS_PER_DAY

NUM_LAYERS, WIDTH, NUM_TOKENS, NUM_STEPS = 4, 128, 512, 5


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(NUM_LAYERS))
    )


def train(
    monkeypatch, directory, num_steps=NUM_STEPS, **budget
) -> tuple[memopt.RunReport, list[int]]:
    """Return the report and the bytes that the I/O engine had written for the model after each step."""
    model, after, probed = blocks(), [], []
    disk_rates = link._disk_rates

    def measure(store):
        before = store.engine.stats().written_bytes
        rates = disk_rates(store)
        probed.append(store.engine.stats().written_bytes - before)
        return rates

    monkeypatch.setattr(link, "_disk_rates", measure)
    spec = memopt.Budget(ssd=f"{directory}:64MiB", **budget)
    with memopt.optimize(model, plan="ssd", budget=spec, engine="threads") as run:
        for _ in range(num_steps):
            model(torch.randn(NUM_TOKENS, WIDTH)).sum().backward()
            model.zero_grad()
            run._resources.transfers.finish()
            after.append(run._resources.io[1].stats().written_bytes - sum(probed))
    assert probed == [link.PROBE_BYTES]  # once, in the session's own extents
    return run.report(), after


def test_written_bytes_of_the_engine_are_the_reports(monkeypatch, tmp_path):
    report, after = train(monkeypatch, tmp_path, ssd_endurance="1PB")
    per_step = [b - a for a, b in itertools.pairwise(after)]
    tensor_bytes = NUM_TOKENS * WIDTH * 4
    assert per_step[0] >= NUM_LAYERS * tensor_bytes  # at least each region's input, or its product
    assert len(set(per_step)) == 1
    assert report.moved.ssd_write_bytes == after[-1]
    wear = report.wear
    assert wear.step_bytes == per_step[0]
    a_day = per_step[0] * SECONDS_PER_DAY / report.median_step_s
    assert wear.day_bytes == pytest.approx(a_day, rel=1e-9)
    assert wear.lifetime_days == pytest.approx(1e15 / a_day, rel=1e-9)
    assert "lasts" in str(report)


def test_the_first_step_runs_in_another_plan_and_does_not_count(monkeypatch, tmp_path):
    report, after = train(monkeypatch, tmp_path, num_steps=2)
    first, second = after[0], after[1] - after[0]
    assert first != second
    assert report.wear.step_bytes == second


def test_without_endurance_bytes_a_day_alone(monkeypatch, tmp_path):
    report, _ = train(monkeypatch, tmp_path)
    assert report.wear.day_bytes > 0
    assert report.wear.lifetime_days is None


def test_without_a_drive_there_is_no_wear():
    model = blocks()
    spec = memopt.Budget(ssd_endurance="600TB")
    with memopt.optimize(model, plan="recompute", budget=spec) as run:
        for _ in range(3):
            model(torch.randn(NUM_TOKENS, WIDTH)).sum().backward()
    report = run.report()
    assert report.wear is None
    assert any("ssd_endurance='600TB' has no effect" in note for note in report.notes)
