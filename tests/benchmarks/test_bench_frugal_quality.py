"""The quality benchmark: its plan, its limits, and that nothing that was trained is lost."""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import _byte_text  # noqa: E402
import _quality_report  # noqa: E402
import bench_frugal_quality as bench  # noqa: E402
from _byte_llama import Llama, Programs  # noqa: E402


@pytest.fixture
def places(tmp_path):
    """A folder with text in files of about 4,000 bytes."""
    draw = random.Random(0)
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(300):
        words = [draw.choice(["alpha", "beta", "gamma", "delta"]) for _ in range(700)]
        lines = [" ".join(words[i : i + 9]) for i in range(0, 700, 9)]
        (folder / f"{number}.py").write_text(f"# {number}\n" + "\n".join(lines))
    return [folder]


@pytest.fixture
def call(monkeypatch, tmp_path, places):
    """Run the benchmark in this process on that text; return what is in the result file."""
    kept = _byte_text.load_corpus
    monkeypatch.setattr(bench, "load_corpus", lambda num_bytes: kept(num_bytes, places))
    monkeypatch.setattr(bench, "CURVE_BATCHES", 1)
    monkeypatch.setattr(bench, "LAST_BATCHES", 2)
    out = tmp_path / "quality.json"

    def run(*arguments):
        fixed = ["--out", str(out), "--bytes", "20000", "--sizes", "tiny", "--tokens", "32",
                 "--batch", "16", "--gap", "10", "--compile", "no"]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["bench_frugal_quality.py", *fixed, *arguments])
        bench.main()
        return json.loads(out.read_text())

    run.out = out
    return run


def options(**more):
    settings = {"bytes": 1000, "gap": 10, "methods": None, "sizes": ["10M"], "seeds": 3,
                "refine": False, "grid_only": False, "only_seeds": None, **more}  # fmt: skip
    return argparse.Namespace(**settings)


def finish(runs, job, loss):
    runs[job.key] = {**vars(job), "loss": loss, "wall_s": 1.0}


def test_plan_takes_the_claim_first_and_extends_a_grid_at_its_edge():
    runs = {}
    plan = bench.Plan(options(), runs)
    first = [(job.method, job.lr) for job in plan.jobs()][:9]
    assert {name for name, _ in first} == set(bench.CORE)
    while (job := next(plan.jobs())).method == "AdamW" and job.num_bytes == 100:
        finish(runs, job, abs(math.log(job.lr / 0.03)))  # the best rate is beyond the grid
    rates = sorted(run["lr"] for run in runs.values())
    assert rates == [1e-3, 3e-3, 9e-3, 0.027, 0.081]
    assert all(job.method != "AdamW" or job.lr == 0.027 for job in plan.jobs())


def test_plan_goes_from_grids_to_seeds_to_neighbours_and_ends():
    runs, order = {}, []
    plan = bench.Plan(options(refine=True), runs)
    middle = {n: sorted(m.grid)[1] for n, m in bench.methods(1).items() if n not in bench.EXTRA}
    while (job := next(plan.jobs(), None)) is not None:
        order.append((job.method, job.num_bytes, job.seed, job.lr))
        finish(runs, job, abs(math.log(job.lr / middle[job.method])))
    full = [entry for entry in order if entry[1] == 1000]
    assert len(order) - len(full) == 18
    at_best = [e[:3] for e in full if math.isclose(e[3], middle[e[0]])]
    assert [e[0] for e in at_best[:3]] == list(bench.CORE)
    assert len(at_best) == 18
    assert len(full) == 18 + 12  # and each method's two neighbours


def test_two_calls_share_the_seeds():
    done = {}
    for seeds in ([0, 1], [0, 2]):
        plan = bench.Plan(options(only_seeds=seeds, methods=["AdamW"]), done)
        while (job := next(plan.jobs(), None)) is not None:
            assert job.seed in seeds
            finish(done, job, abs(math.log(job.lr / 3e-3)))
    assert sorted(run["seed"] for run in done.values() if run["num_bytes"] == 1000) == [0, 1, 2]


def test_grid_only_ends_before_the_first_full_run():
    runs = {}
    plan = bench.Plan(options(grid_only=True, methods=["AdamW", "AdamW, scale 0.25"]), runs)
    middle = {name: sorted(method.grid)[1] for name, method in bench.methods(1).items()}
    while (job := next(plan.jobs(), None)) is not None:
        finish(runs, job, abs(math.log(job.lr / middle[job.method])))
    assert {run["num_bytes"] for run in runs.values()} == {100}
    assert len(runs) == 6


def test_the_control_has_galores_rates():
    model = Llama("tiny", 16, Programs(compiled=False), torch.float32)
    rates = {
        id(p): group["lr"]
        for group in bench.methods(10)["AdamW, scale 0.25"].make(model, 0.01).param_groups
        for p in group["params"]
    }
    assert rates[id(model.embed.weight)] == rates[id(model.head.weight)] == 0.01
    assert {rates[id(p)] for layer in model.layers for p in layer.parameters() if p.dim() == 2} == {
        0.0025
    }


def test_a_better_neighbour_is_trained_with_all_seeds():
    runs = {}
    plan = bench.Plan(options(refine=True, methods=["AdamW"]), runs)
    while (job := next(plan.jobs(), None)) is not None:  # short runs like 3e-3, long ones 1e-3
        best = 3e-3 if job.num_bytes == 100 else 1e-3
        finish(runs, job, abs(math.log(job.lr / best)))
    assert {r["seed"] for r in runs.values() if r["num_bytes"] == 1000 and r["lr"] == 1e-3} == {
        0,
        1,
        2,
    }


def test_a_job_that_does_not_fit_waits_for_one_that_does():
    runs = {}
    plan = bench.Plan(options(), runs)
    job = next(plan.jobs())
    finish(runs, job, 1.0)  # 1 s for 100 bytes
    long = bench.Job(size="10M", method="AdamW", lr=1e-3, seed=0, num_bytes=1000)
    assert 10.0 <= plan.seconds(long, guess=0.0) <= 11.0
    assert (
        plan.seconds(bench.Job(size="60M", method="AdamW", lr=1e-3, seed=0, num_bytes=10), 2.0)
        == 26.0
    )


def test_whole_call_then_nothing_left_and_a_report(call):
    results = call("--methods", "AdamW", "FRUGAL 0.25", "GaLore 0.25", "--seeds", "2")
    rows = results["summary"]["tiny"]["methods"]
    assert {name: row["seeds"] for name, row in rows.items()} == dict.fromkeys(bench.CORE, 2)
    assert all(row["loss"] < 5.0 for row in rows.values())  # log(256) = 5.5 untrained
    assert not results["unfinished"]
    assert call.out.with_suffix(".png").stat().st_size > 10_000
    assert "of the gap from GaLore to AdamW" in call.out.with_suffix(".md").read_text()
    again = call("--methods", "AdamW", "FRUGAL 0.25", "GaLore 0.25", "--seeds", "2")
    assert again["runs"] == results["runs"]
    assert len(again["sessions"]) == 2


def test_a_run_that_meets_the_limit_is_kept_and_made_again(call, monkeypatch):
    job = bench.Job(size="tiny", method="AdamW", lr=1e-3, seed=0, num_bytes=2000)
    once = iter([[job], []])
    train = bench.Trainer.run
    with monkeypatch.context() as patch:
        patch.setattr(bench.Plan, "jobs", lambda _: next(once))
        patch.setattr(bench.Plan, "seconds", lambda *_: 0.0)
        patch.setattr(bench.Trainer, "run", lambda self, job, _, note: train(self, job, 0.0, note))
        cut = call("--methods", "AdamW")
    assert cut["unfinished"]
    (left,) = cut["unfinished"].values()
    assert left["cut_off"]
    assert left["curve"]
    done = call("--methods", "AdamW", "--seeds", "1")
    assert not done["unfinished"]
    assert cut["unfinished"].keys() <= done["runs"].keys()


def test_resume_joins_files_and_refuses_other_settings(call, tmp_path):
    first = call("--methods", "AdamW", "--seeds", "1")
    moved = tmp_path / "brought_back.json"
    call.out.rename(moved)
    joined = call("--methods", "AdamW", "--seeds", "1", "--resume", str(moved))
    assert joined["runs"] == first["runs"]
    with pytest.raises(SystemExit, match="was made with"):
        call("--gap", "20", "--report")


def test_divergence_is_a_result(call, monkeypatch):
    monkeypatch.setattr(bench.Trainer, "validate", lambda *_: (math.nan, math.nan))
    results = call("--methods", "AdamW", "--limit-s", "60")
    assert all(run["diverged"] and run["loss"] == math.inf for run in results["runs"].values())
    assert results["summary"] == {}  # no rate is worth a full run


def test_every_method_begins_with_the_same_weights_and_batches(places):
    text = _byte_text.load_corpus(200_000, places)
    trainer = bench.Trainer.__new__(bench.Trainer)
    trainer.device, trainer.tokens, trainer.batch = "cpu", 16, 4
    assert torch.equal(trainer.starts(text.train, 3, 1001), trainer.starts(text.train, 3, 1001))
    assert not torch.equal(trainer.starts(text.train, 3, 1001), trainer.starts(text.train, 3, 1002))


def test_text_is_the_same_every_time_and_validation_is_not_trained_on(places):
    one, two = (_byte_text.load_corpus(200_000, places) for _ in range(2))
    assert one.digest == two.digest
    assert len(one.train) == 200_000
    whole = bytes(one.train.tolist())
    held_out = bytes(one.valid.tolist())
    assert held_out[:3000] not in whole
    with pytest.raises(ValueError, match="bytes of text were found"):
        _byte_text.load_corpus(1000, [places[0] / "none"])


def test_model_learns_and_ignores_the_future():
    torch.manual_seed(0)
    model = Llama("tiny", 16, Programs(compiled=False), torch.float32)
    text = torch.randint(256, (2, 17))
    changed = text.clone()
    changed[:, 12:] = 7
    seen = []
    model.programs.head_loss = lambda x, *_: seen.append(x) or x.sum()
    model(text)
    model(changed)
    torch.testing.assert_close(seen[0][:, :12], seen[1][:, :12])
    assert not torch.allclose(seen[0][:, 12:], seen[1][:, 12:])


def test_share_of_the_gap_is_that_of_the_means():
    def run(method, loss, seed):
        return {"size": "10M", "method": method, "lr": 1e-3, "seed": seed, "num_bytes": 1000,
                "loss": loss, "state_bytes": 1, "parameters": 1, "train_s": 1.0, "tokens_per_s": 1.0,
                "text_digest": "x", "wall_s": 1.0, "curve": [[1, loss, 1.0]]}  # fmt: skip

    losses = {"AdamW": (1.0, 1.0), "GaLore 0.25": (2.0, 4.0), "FRUGAL 0.25": (1.5, 1.0)}
    runs = {f"{m}{s}": run(m, loss, s) for m, pair in losses.items() for s, loss in enumerate(pair)}
    results = {"settings": {"bytes": 1000}, "runs": runs, "sessions": [], "unfinished": {}}
    found = _quality_report.summary(results, 0.1)["10M"]
    assert found["gap_closed_by_seed"] == {"0": 0.5, "1": 1.0}
    assert math.isclose(found["gap_closed"], (3.0 - 1.25) / (3.0 - 1.0))


def test_a_curve_is_on_one_set_and_the_loss_on_all_of_it(call):
    results = call("--limit-s", "60", "--methods", "AdamW", "--seeds", "1")
    full = [run for run in results["runs"].values() if run["num_bytes"] == 20000]
    assert full
    for run in full:
        assert run["curve"][-1][0] == run["steps"] * 16 * 32
        assert run["curve"][-1][1] != run["loss"]  # one batch, and two
        assert _quality_report.curve_of(run) == run["curve"]
        del run["curve_batches"]  # as runs were before: the last point was the final loss
        assert _quality_report.curve_of(run) == run["curve"][:-1]
