"""The demo's picture: memory over time, plain and under memopt, accounted and resident."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MIB = 1 << 20
COLOURS = {"plain": "#b04a3a", "memopt": "#2a6f97"}


def draw(runs: Mapping[str, Mapping[str, Any]], budget_bytes: int, path: Path) -> None:
    """Write a PNG with two panels (accounted bytes, resident set) that share the time axis.

    Args:
        runs: "plain" and "memopt"; each with `samples`, rows of (seconds, accounted, resident).
        budget_bytes: the device budget, drawn as a line over the accounted bytes.
        path: file to write.

    """
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    titles = ("live tensors (accounted)", "resident set of the process")
    for column, (axes, title) in enumerate(zip(panels, titles, strict=True), start=1):
        for name, run in runs.items():
            seconds = [sample[0] for sample in run["samples"]]
            mebibytes = [sample[column] / MIB for sample in run["samples"]]
            axes.plot(seconds, mebibytes, label=name, color=COLOURS[name], linewidth=0.9)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_ylabel("MiB")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    panels[0].axhline(
        budget_bytes / MIB, color="black", linestyle="--", linewidth=1, label="budget"
    )
    panels[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, fontsize=9, frameon=False)
    panels[1].set_xlabel("seconds since training began")
    figure.savefig(path, dpi=140)
