"""The activation benchmark's own logic, on a tiny model on the CPU: what it says must be what happened."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("bench_activations")


@pytest.fixture
def methods(bench):
    return importlib.import_module("_activation_methods")


@pytest.fixture
def table(bench):
    return importlib.import_module("_activation_table")


def dry(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "benchmarks" / "bench_activations.py")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, script, "--dry", "--out", str(out), *options],
        capture_output=True,
        text=True,
        env=env,
        check=False,
        timeout=240,
    )


def run_of(out: Path) -> dict:
    (run,) = json.loads(out.read_text())["runs"]
    return run


# -------------------------------------------------------------------------------------------- the whole script


def test_dry_run_measures_every_row_it_can_and_says_why_not(tmp_path):
    out = tmp_path / "activations.json"
    rows = "128:plain 128:memopt=ssd@1GiB 128:trl"
    done = dry(out, "--rows", rows, "--plans", str(tmp_path / "plans.json"))
    assert done.returncode == 0, (
        done.stdout + done.stderr + (tmp_path / "activations.log").read_text()
    )
    plain, memopt, trl = run_of(out)["rows"]
    assert [row["status"] for row in (plain, memopt, trl)] == ["ok", "ok", "skipped"]
    assert trl["reason"] == "needs CUDA"
    assert len(plain["untimed_step_s"]) == 1
    assert len(memopt["untimed_step_s"]) == 5
    assert len(plain["step_s"]) == len(memopt["step_s"]) == 1
    assert memopt["ratio_to_plain"] == pytest.approx(memopt["step_s"][0] / plain["step_s"][0])
    assert memopt["loss_agrees"] is True
    assert memopt["grad_norm"] == plain["grad_norm"] > 0
    assert plain["attention"]
    assert plain["resident_peak_bytes"] > 100 << 20
    moved = memopt["method_report"]["report"]["moved"]
    assert moved["ssd_write_bytes"] > 0, (
        "plan='ssd' moved nothing: this row measured the plain step"
    )
    plans = json.loads((tmp_path / "plans.json").read_text())
    assert plans.keys() == {"128 memopt=ssd@1GiB"}
    assert plans["128 memopt=ssd@1GiB"]["plan"]["regions"]
    assert plans["128 memopt=ssd@1GiB"]["trace"]["regions"]
    assert "plan" not in memopt["method_report"]
    shown = (tmp_path / "activations.md").read_text()
    assert "| 128 | memopt=ssd@1GiB |" in shown
    assert "128 trl: skipped: needs CUDA" in shown
    assert not list(tmp_path.glob("*.row*")), "intermediate results are left"


def test_a_run_says_where_it_comes_from(tmp_path):
    out = tmp_path / "r.json"
    assert dry(out, "--rows", "128:trl").returncode == 0
    run = run_of(out)
    assert {"torch", "transformers", "python"} <= run["versions"].keys()
    assert run["commit"]
    assert run["command"] == "python bench_activations.py --dry --out r.json --rows 128:trl"
    assert run["machine"]["host_limit_bytes"] > 0
    assert dry(out, "--rows", "128:trl", "--append").returncode == 0
    assert len(json.loads(out.read_text())["runs"]) == 2


@pytest.mark.parametrize(
    ("options", "status"),
    [(["--row-limit", "0.5"], "time limit"), (["--host-limit", "20MiB"], "out of host memory")],
)
def test_a_row_that_takes_too_much_is_ended(tmp_path, options, status):
    out = tmp_path / "r.json"
    begin = time.monotonic()
    assert dry(out, "--rows", "128:plain", *options).returncode == 0
    (row,) = run_of(out)["rows"]
    assert row["status"] == status
    assert row["reason"]
    assert row["median_step_s"] is None
    assert time.monotonic() - begin < 60


def test_rows_after_the_time_limit_are_reported_as_not_run(tmp_path):
    out = tmp_path / "r.json"
    assert dry(out, "--rows", "128:plain 128:checkpoint", "--limit", "1").returncode == 0
    assert [row["status"] for row in run_of(out)["rows"]] == ["not run", "not run"]


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (["ok", "skipped", "does not fit", "time limit", "not installed"], 0),
        (["ok", "failed"], 1),
        (["refused"], 1),
    ],
)
def test_only_a_failure_makes_the_script_fail(bench, tmp_path, monkeypatch, statuses, code):
    left = list(statuses)
    monkeypatch.setattr(bench, "_tried", lambda *_, **__: {"status": left.pop(0)})
    rows = " ".join(["128:plain"] * len(statuses))
    arguments = bench._arguments(["--dry", "--out", str(tmp_path / "r.json"), "--rows", rows])
    assert bench._main_parent(arguments) == code
    assert [row["status"] for row in run_of(tmp_path / "r.json")["rows"]] == statuses


# ------------------------------------------------------------------------------------- one row, in this process


@pytest.fixture
def measure(bench, methods, tmp_path):
    """Run one row of 32 tokens in this process and return its result."""
    child = importlib.import_module("_activation_child")

    def measure(text: str) -> dict:
        budget = "@1GiB" if text.startswith("memopt") else ""
        row = methods.parse_row(f"32:{text}{budget}", budgets={}, num_steps={0: (2, 1)})
        spec = child.Child(
            row=dataclasses.asdict(row),
            settings={"host_budget": "", "ssd_budget": f"{tmp_path}:64MiB"},
            device="cpu",
            config=bench.TINY,
            liger=False,
            liger_rope=False,
        )
        result = tmp_path / f"{text}.json"
        child.run_child(json.dumps(dataclasses.asdict(spec)), result)
        return json.loads(result.read_text())

    return measure


@pytest.mark.parametrize("method", ["checkpoint", "save_on_cpu", "memopt", "memopt=recompute"])
def test_every_method_gives_the_plain_loss(measure, method):
    plain, other = measure("plain"), measure(method)
    assert plain["status"] == "ok", plain
    assert other["status"] == "ok", other
    assert set(other["losses"]) == set(plain["losses"])
    assert len(set(plain["losses"])) == 1
    assert other["grad_norm"] == plain["grad_norm"]


def test_a_failure_is_a_result_with_its_reason(measure):
    row = measure("memopt=nosuchplan")
    assert row["status"] == "failed"
    assert "nosuchplan" in row["reason"]


# --------------------------------------------------------------------------------------------------- the parts


def test_rows_are_read_as_written(methods):
    steps = {64: (2, 5), 0: (1, 3)}
    row = methods.parse_row("64:memopt=plans/a.json@39GiB", budgets={}, num_steps=steps)
    assert (row.tokens, row.method, row.plan, row.device_budget) == (
        64,
        "memopt",
        "plans/a.json",
        "39GiB",
    )
    assert (row.num_untimed, row.num_timed) == (6, 5)
    assert row.label == "memopt=plans/a.json@39GiB"
    peer = methods.parse_row("65:plain", budgets={}, num_steps=steps)
    assert (peer.num_untimed, peer.num_timed, peer.label) == (1, 3, "plain")
    assert (
        methods.parse_row("64:memopt", budgets={64: "1GiB"}, num_steps=steps).device_budget
        == "1GiB"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plain", "TOKENS:METHOD"),
        ("64:nothing", "TOKENS:METHOD"),
        ("many:plain", "TOKENS:METHOD"),
        ("64:memopt", "no device budget is known at 64 tokens"),
        ("64:memopt@39", "GiB"),
        ("64:plain@39GiB", "only memopt"),
        ("64:trl=recompute", "only memopt"),
    ],
)
def test_a_wrong_row_is_refused_with_the_remedy(methods, text, message):
    with pytest.raises(ValueError, match=message):
        methods.parse_row(text, budgets={}, num_steps={0: (2, 3)})


def test_default_rows_are_valid_and_begin_with_what_matters(bench, methods):
    for rows in (bench.ROWS, bench.DRY_ROWS):
        parsed = [
            methods.parse_row(t, budgets=bench.BUDGETS, num_steps=bench.NUM_STEPS)
            for t in rows.split()
        ]
        assert len(set(parsed)) == len(parsed)
    first = [(r.tokens, r.method) for r in parsed[:1]]
    assert first == [(128, "plain")]
    assert bench.ROWS.split()[:3] == ["16384:memopt", "16384:plain", "16384:checkpoint"]


def test_estimate_is_the_plain_steps_bytes(bench, methods):
    def why(tokens: int, method: str, device_gib: float, host_gib: float) -> str:
        row = methods.Row(tokens=tokens, method=method)
        limits = {"device": int(device_gib * GIB), "host": int(host_gib * GIB)}
        return bench._hopeless(row, bench.LLAMA_8B, limits)

    # Parameters and gradients of 8.03e9 numbers in two bytes: 29.9 GiB. Saved for one token in one layer, in numbers:
    # 6 x 4,096 + 2 x 1,024 + 3 x 14,336 = 69,632; in two bytes, 32 layers, 16,384 tokens: 68 GiB.
    assert "estimated 98 GiB of device" in why(16384, "plain", 80, 500)
    assert why(16384, "plain", 139.8, 500) == ""
    assert "estimated 272 GiB of host" in why(65536, "trl", 139.8, 118)
    assert why(65536, "trl", 139.8, 300) == ""
    for method in ("checkpoint", "memopt", "trl_checkpoint"):
        assert why(65536, method, 139.8, 118) == ""


def test_peaks_survive_a_reset_by_the_method_under_test(bench, monkeypatch):
    import torch

    now = {"allocated": 0, "reserved": 0}

    def reset(device: object = None) -> None:
        now.update(allocated=1, reserved=2)

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: now["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: now["reserved"])
    monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: {"allocated_bytes.peak": 5})
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_alloc_retries": 0})
    peaks = importlib.import_module("_activation_child").Peaks()
    peaks.install()
    peaks.start()
    now.update(allocated=10, reserved=20)
    torch.cuda.reset_peak_memory_stats("cuda:0")  # what the method does between steps
    assert now == {"allocated": 1, "reserved": 2}, "the method's own reset must still work"
    now.update(allocated=7, reserved=30)
    read = peaks.read()
    assert read["peak_allocated_bytes"] == 10
    assert read["peak_reserved_bytes"] == 30
    assert read["torch_pinned_bytes"] == 5
    peaks.start()
    assert peaks.read()["peak_allocated_bytes"] == 1


def row_of(
    method: str, step_s: float, *, loss: float = 2.0, status: str = "ok", tokens: int = 8
) -> dict:
    return {
        "tokens": tokens,
        "method": method,
        "label": method,
        "status": status,
        "median_step_s": step_s,
        "losses": [loss, loss],
    }


def test_ratios_are_to_the_rows_of_the_same_length(table):
    rows = [
        row_of("memopt", 1.1),
        row_of("plain", 1.0),
        row_of("checkpoint", 1.25),
        row_of("memopt", 9.0, tokens=16),
    ]
    table.add_ratios(rows)
    assert rows[0]["ratio_to_plain"] == pytest.approx(1.1)
    assert rows[0]["ratio_to_checkpoint"] == pytest.approx(0.88)
    assert rows[3]["ratio_to_plain"] is None
    assert rows[3]["ratio_to_checkpoint"] is None


def test_a_plain_row_that_failed_is_no_base(table):
    rows = [row_of("memopt", 1.1), row_of("plain", 1.0, status="time limit")]
    table.add_ratios(rows)
    assert rows[0]["ratio_to_plain"] is None


def test_another_loss_is_shown(table):
    rows = [row_of("plain", 1.0), row_of("memopt", 1.1, loss=2.0000001), row_of("trl", 1.2)]
    table.add_ratios(rows)
    assert [row["loss_agrees"] for row in rows] == [None, False, True]
    assert "DIFFERS" in table.cells(rows[1])


def test_pinned_bytes_are_pytorchs_and_memopts(table):
    report = {"report": {"measured": {"host_bytes": 5}}}
    assert table.pinned_bytes({"torch_pinned_bytes": 7, "method_report": report}) == 12
    assert table.pinned_bytes({"torch_pinned_bytes": 7}) == 7
    assert table.pinned_bytes({}) is None
