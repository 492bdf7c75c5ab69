"""The figures in docs/frugal.md are those of the result files it names."""

from __future__ import annotations

import json
import statistics

import pytest

from tests.benchmarks.test_doc_figures import RESULTS, ROOT
from tests.benchmarks.test_doc_figures import table as rows_of

STEPS = {
    "torch AdamW, fused": "torch AdamW fused",
    "torch AdamW, foreach": "torch AdamW foreach",
    "torch SGD, fused": "torch SGD fused",
    "FRUGAL 0.25, blocks, all parameters split": "frugal all",
    "FRUGAL 0.25, `frugal_groups`: embedding full": "frugal groups",
    "rows": "frugal rows",
    "columns": "frugal columns",
    "coordinates": "frugal coordinates",
    'blocks, `quantize="8bit"`': "frugal 8bit",
    'blocks, `rounding="stochastic"`': "frugal stochastic",
    'blocks, `rounding="kahan"`': "frugal kahan",
    'blocks, `impl="foreach"`': "frugal all, foreach",
}


def table(heading):
    """Return {first cell: other cells} of the table in the document whose heading starts so."""
    return {first: others for first, *others in rows_of("docs/frugal.md", heading)}


def test_step_times():
    times = json.loads((RESULTS / "frugal_step_h200_20261128b.json").read_text())["times"]
    shown = table("| step, ms |")
    assert shown.keys() == STEPS.keys()
    for label, cells in shown.items():
        name = STEPS[label]
        wanted = []
        for dtype in ("bf16", "fp32"):
            for key in (name, f"{name}, every step a switch"):
                found = times[dtype].get(key)
                wanted.append(f"{found['ms']:.2f}" if found else "")
        wanted.append(f"{times['bf16'][name]['state_bytes_per_parameter']:.2f}")
        assert cells == wanted, label


def test_first_steps_and_svd():
    found = json.loads((RESULTS / "frugal_step_h200_20261128b.json").read_text())
    first, svd = found["cold_first_step_ms"], found["svd, one block of seven matrices"]
    text = (ROOT / "docs" / "frugal.md").read_text().replace("\n", " ")
    ours, theirs = first["frugal all"], first["torch AdamW fused"]
    assert f"process took {ours:.0f} ms, AdamW's {theirs:.0f}:" in text
    assert f"take {svd['switch_ms']:.0f} ms at a switch and {svd['step_ms']:.1f} ms in" in text
    assert 4.5 < 16 * svd["switch_ms"] / 1e3 < 5.5


def test_quality():
    runs = json.loads((RESULTS / "frugal_quality_h200.json").read_text())["runs"]
    for method, (lr, *cells, state) in table("| method | lr | validation").items():
        alike = [
            run
            for run in runs.values()
            if (run["method"], f"{run['lr']:g}", run["num_bytes"]) == (method, lr, 300_000_000)
        ]
        losses = [run["loss"] for run in alike]
        mean, lowest, highest = statistics.fmean(losses), min(losses), max(losses)
        assert cells == [f"{mean:.4f}", str(len(losses)), f"{lowest:.4f}", f"{highest:.4f}"]
        assert float(state) == pytest.approx(alike[0]["state_bytes"] / 2**20, abs=0.05)


def test_horizon():
    for steps, *cells in (
        [steps, *rest] for steps, rest in table("| steps | AdamW | FRUGAL 0.25 |").items()
    ):
        path = next(
            p
            for p in RESULTS.glob("frugal_horizon_cpu_*.json")
            if any(f"{r['steps']:,}" == steps for r in json.loads(p.read_text())["runs"].values())
        )
        found = json.loads(path.read_text())
        whole = [r for r in found["runs"].values() if f"{r['steps']:,}" == steps]
        losses = {
            (method, r["seed"]): r["loss"]
            for method in ("AdamW", "FRUGAL 0.25", "GaLore 0.25")
            for r in whole
            if r["method"] == method and r["num_bytes"] == found["settings"]["bytes"]
        }
        seeds = sorted({seed for _, seed in losses})
        wanted = [
            f"{statistics.fmean(losses[method, seed] for seed in seeds):.4f}"
            for method in ("AdamW", "FRUGAL 0.25", "GaLore 0.25")
        ]
        closed = []
        for seed in seeds:
            adamw, frugal, galore = (
                losses[method, seed] for method in ("AdamW", "FRUGAL 0.25", "GaLore 0.25")
            )
            closed.append(f"{(galore - frugal) / (galore - adamw):.2f}")
        assert cells == [*wanted, ", ".join(closed)]
