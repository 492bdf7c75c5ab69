"""The figures in README.md and docs/ are those of the result files they name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
GIB = 1 << 30
METHODS = {
    "plain": "plain",
    "full checkpointing": "checkpoint",
    "memopt, device budget 39 GiB": "memopt@39GiB",
    "memopt, device budget 61 GiB": "memopt@61GiB",
}
IO = {
    "fio": "fio",
    "memopt, io_uring": "memopt io_uring",
    "fio, registered buffers": "fio, registered",
    "memopt, io_uring, registered buffers": "memopt io_uring, registered",
    "memopt, threads": "memopt threads",
    "fio as it comes (small pages)": "fio, small pages",
    "DeepSpeed's `aio_handle` (small pages)": "DeepSpeed aio_handle",
}
PINNED = {
    "memopt, 4 threads": "memopt, 4 threads",
    "memopt, 4 threads, no huge pages": "memopt, 4 threads, no huge pages",
    "memopt, 1 thread": "memopt, 1 thread",
    "`pin_memory=True`": "torch pin_memory",
    "`pin_memory=True` with `pinned_use_cuda_host_register` and 8 threads": "torch pin_memory, options",
}


def table(path: str, heading: str) -> list[list[str]]:
    """Return the cells of the rows below the heading that starts so."""
    lines = (ROOT / path).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(heading))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert rows
    return rows


def measured() -> dict[tuple[int, str], dict]:
    """Return the rows of the newest runs by tokens and label."""
    runs = json.loads((RESULTS / "activations_h200_20261128b.json").read_text())["runs"]
    return {(row["tokens"], row["label"]): row for run in runs for row in run["rows"]}


def test_activations_page():
    found = measured()
    for tokens, method, step, ratio, peak, host, first in table(
        "docs/activations.md", "| tokens | method | step |"
    ):
        row = found[int(tokens.replace(",", "")), METHODS[method]]
        assert step == f"{row['median_step_s']:.3f} s"
        assert peak == f"{row['peak_allocated_bytes'] / GIB:.1f} GiB"
        assert first == ", ".join(f"{s:.2f}" for s in row["untimed_step_s"])
        moved = method.startswith("memopt")
        assert host == (f"{row['host_pinned_bytes'] / GIB:.1f} GiB" if moved else "")
        to_plain, to_checkpoint = row["ratio_to_plain"], row["ratio_to_checkpoint"]
        if ratio == "1":
            assert 1.0 in (to_plain, to_checkpoint)
        elif "plain" in ratio:
            assert ratio == f"{to_plain:.3f} x plain"
        else:
            assert ratio == f"{to_checkpoint:.3f} x checkpointing"


def test_activations_page_says_what_was_reserved_and_predicted():
    text = (ROOT / "docs/activations.md").read_text().replace("\n", " ")
    short, long = (measured()[key] for key in ((16384, "memopt@39GiB"), (65536, "memopt@61GiB")))
    reserved = [f"{row['peak_reserved_bytes'] / GIB:.1f}" for row in (short, long)]
    assert f"was {reserved[0]} and {reserved[1]} GiB" in text
    predicted = [row["method_report"]["report"]["predicted"] for row in (short, long)]
    times = f"{predicted[0]['step_s']:.3f} and {predicted[1]['step_s']:.2f} s"
    peaks = " and ".join(f"{p['device_bytes'] / GIB:.1f}" for p in predicted)
    assert f"predicted {times}, {peaks} GiB" in text


def test_readme():
    found = measured()
    for tokens, label, step, peak in table("README.md", "| tokens | | step | peak |"):
        name = {"memopt, 39 GiB": "memopt@39GiB", "memopt, 61 GiB": "memopt@61GiB"}.get(
            label, METHODS.get(label)
        )
        row = found[int(tokens.replace(",", "")), name]
        seconds, _, ratio = step.partition(" s")
        assert float(seconds) == pytest.approx(
            row["median_step_s"], abs=0.51 * 10 ** -len(seconds.split(".")[1])
        )
        assert peak.startswith(f"{row['peak_allocated_bytes'] / GIB:.1f} GiB")
        if "host" in peak:
            assert peak.endswith(f"host {row['host_pinned_bytes'] / GIB:.0f} GiB")
        if "plain" in ratio:
            assert ratio == f" ({row['ratio_to_plain']:.2f} x plain)"
        elif "checkpointing" in ratio:
            assert ratio == f" ({row['ratio_to_checkpoint']:.2f} x checkpointing)"


def test_io_page():
    summary = json.loads((RESULTS / "io_cpu_vm_20261128.json").read_text())["summary"]
    found = {(row["who"], row["kind"]): row for row in summary}
    rows = table("docs/io.md", "| | write, GB/s |")
    assert {row[0] for row in rows} == IO.keys()
    for label, *cells in rows:
        wanted = []
        for kind in ("write", "read"):
            row = found[IO[label], kind]
            ratio = f"{row['ratio_to_fio']:.2f}" if not label.startswith("fio") else "1"
            wanted += [f"{row['gb_per_s']:.2f}", "" if "small" in label else ratio]
            wanted.append(f"{row['cpu_s_per_gib']:.3f}")
        assert cells == wanted, label


def test_pinned_page():
    rows = json.loads((RESULTS / "pinned_h200_20261128.json").read_text())["rows"]
    found = {row["way"]: row for row in rows}
    shown = table("docs/pinned_memory.md", "| | s per GiB | waste |")
    assert {row[0] for row in shown} == PINNED.keys()
    for label, seconds, waste, stall in shown:
        row = found[PINNED[label]]
        assert seconds == f"{row['s_per_gib']:.3f}"
        assert float(waste.removesuffix(" %")) == pytest.approx(100 * row["waste"], abs=0.05)
        assert stall == f"{1e3 * row['stall_s']:.0f} ms"
