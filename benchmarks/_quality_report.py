"""What `bench_frugal_quality.py` found, as numbers, a table and a picture. Reads results only."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

CLAIM = 0.8  # FRUGAL 0.25 closes at least this share of the gap from GaLore to AdamW
Run = dict[str, Any]


def best_rate(runs: dict[str, Run], size: str, method: str, num_bytes: int) -> float | None:
    """Return the learning rate of the best seed-0 run of a length; None where all diverged."""
    found = [
        (run["loss"], run["lr"])
        for run in runs.values()
        if (run["size"], run["method"], run["num_bytes"], run["seed"])
        == (size, method, num_bytes, 0)
        and math.isfinite(run["loss"])
    ]
    return min(found)[1] if found else None


def full_rate(
    runs: dict[str, Run], size: str, method: str, grid_bytes: int, num_bytes: int
) -> float | None:
    """Return the rate for full runs: the best one of full length so far, else the grid's best."""
    full = best_rate(runs, size, method, num_bytes)
    return best_rate(runs, size, method, grid_bytes) if full is None else full


def chosen_runs(results: dict[str, Any]) -> dict[str, dict[str, list[Run]]]:
    """Return size -> method -> the full runs at the chosen rate, by seed."""
    runs, num_bytes = results["runs"], results["settings"]["bytes"]
    table: dict[str, dict[str, list[Run]]] = {}
    for run in runs.values():
        if run["num_bytes"] != num_bytes:
            continue
        rate = best_rate(runs, run["size"], run["method"], num_bytes)
        if rate is not None and run["lr"] == rate:
            table.setdefault(run["size"], {}).setdefault(run["method"], []).append(run)
    for by_method in table.values():
        for group in by_method.values():
            group.sort(key=lambda run: int(run["seed"]))
    return table


def curve_of(run: Run) -> list[list[float]]:
    """Return (bytes, loss, seconds) of the points that were computed on the same batches.

    Runs without "curve_batches" were made when the last point still was the final loss, on six times
    as many batches: the step down there was the batches', not the optimizer's, so it is left out.
    """
    curve: list[list[float]] = run["curve"]
    return curve if "curve_batches" in run else curve[:-1]


def summary(results: dict[str, Any], grid_share: float) -> dict[str, Any]:
    """Return mean loss and spread of every (size, method), and the share of GaLore's gap closed."""
    grid_bytes = int(results["settings"]["bytes"] * grid_share)
    found: dict[str, Any] = {}
    for size, by_method in chosen_runs(results).items():
        rows = {
            name: _row(group, _grid(results["runs"], size, name, grid_bytes))
            for name, group in by_method.items()
        }
        found[size] = {
            "methods": rows, "claim": CLAIM, "gap_closed_by_seed": _gap_closed(by_method),
        }  # fmt: skip
        found[size]["gap_closed"] = _mean_gap_closed(by_method, found[size]["gap_closed_by_seed"])
        found[size]["text_digests"] = sorted(
            {run["text_digest"] for group in by_method.values() for run in group}
        )
    return found


def _grid(runs: dict[str, Run], size: str, method: str, grid_bytes: int) -> dict[str, float]:
    """Return learning rate -> loss of the grid's runs."""
    wanted = (size, method, grid_bytes)
    alike = [r for r in runs.values() if (r["size"], r["method"], r["num_bytes"]) == wanted]
    return {
        f"{run['lr']:g}": run["loss"] for run in sorted(alike, key=lambda run: float(run["lr"]))
    }


def _gap_closed(by_method: dict[str, list[Run]]) -> dict[str, float]:
    """Return seed -> (GaLore - FRUGAL 0.25) / (GaLore - AdamW), for the seeds that all three have."""
    losses = {
        name: {run["seed"]: run["loss"] for run in group} for name, group in by_method.items()
    }
    if not {"AdamW", "GaLore 0.25", "FRUGAL 0.25"} <= losses.keys():
        return {}
    adamw, galore, frugal = (losses[name] for name in ("AdamW", "GaLore 0.25", "FRUGAL 0.25"))
    seeds = sorted(adamw.keys() & galore.keys() & frugal.keys())
    return {str(s): (galore[s] - frugal[s]) / (galore[s] - adamw[s]) for s in seeds}


def _mean_gap_closed(by_method: dict[str, list[Run]], seeds: dict[str, float]) -> float | None:
    """Return the share of the mean gap over these seeds, as single gaps may be near zero."""
    if not seeds:
        return None
    galore, frugal, adamw = (
        statistics.fmean(run["loss"] for run in by_method[name] if str(run["seed"]) in seeds)
        for name in ("GaLore 0.25", "FRUGAL 0.25", "AdamW")
    )
    return (galore - frugal) / (galore - adamw)


def _row(group: list[Run], grid: dict[str, float]) -> dict[str, Any]:
    losses = [run["loss"] for run in group]
    rates = [float(rate) for rate in grid]
    rate = group[0]["lr"]
    return {
        "loss": statistics.fmean(losses), "losses": losses, "spread": max(losses) - min(losses),
        "seeds": len(group), "lr": rate, "grid": grid,
        "lr_at_edge_of_grid": rate in (min(rates, default=rate), max(rates, default=rate)),
        "state_bytes": group[0]["state_bytes"], "parameters": group[0]["parameters"],
        "peak_bytes": max(run.get("peak_bytes", 0) for run in group),
        "train_s": statistics.median(run["train_s"] for run in group),
        "tokens_per_s": statistics.median(run["tokens_per_s"] for run in group),
    }  # fmt: skip


def markdown(results: dict[str, Any]) -> str:
    """Return the summary as Markdown."""
    settings, sessions = results["settings"], results["sessions"]
    devices = ", ".join(sorted({session["device"] for session in sessions}))
    title = (
        f"Byte-level LLaMA, {settings['bytes'] / 1e6:g} M bytes, {settings['batch']} x"
        f" {settings['tokens']} tokens a step, gap {settings['gap']}; {devices}."
    )
    lines = [title, ""]
    for size, found in results.get("summary", {}).items():
        lines += [
            f"| {size} | lr | validation loss, nats a byte | spread | seeds | state, MiB | s of training |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for name, row in sorted(found["methods"].items(), key=lambda item: item[1]["loss"]):
            edge = " (edge of grid)" if row["lr_at_edge_of_grid"] else ""
            lines.append(
                f"| {name} | {row['lr']:g}{edge} | {row['loss']:.4f} | {row['spread']:.4f} |"
                f" {row['seeds']} | {row['state_bytes'] / 2**20:.1f} | {row['train_s']:.0f} |"
            )
        if found["gap_closed"] is not None:
            by_seed = ", ".join(f"{value:.2f}" for value in found["gap_closed_by_seed"].values())
            verdict = (
                f"FRUGAL 0.25 closes {found['gap_closed']:.2f} of the gap from GaLore to AdamW"
                f" (claim: at least {found['claim']}; by seed: {by_seed})."
            )
            lines += ["", verdict]
        lines.append("")
    lines.append(
        "The losses are on all 48 validation batches after the last step (x in the picture); the lines"
        " are on the first 8 of them."
    )
    if any("curve_batches" not in run for run in results["runs"].values()):
        lines += ["Runs of the first session have no point of their line after the last step.", ""]
    if results["unfinished"]:
        lines += ["Unfinished: " + ", ".join(sorted(results["unfinished"])) + ".", ""]
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw loss against bytes, time and state: the mean over seeds, and their range."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    table = chosen_runs(results)
    figure, rows = plt.subplots(
        len(table), 3, figsize=(15, 4.5 * len(table)), constrained_layout=True, squeeze=False
    )
    for axes, (size, by_method) in zip(rows, table.items(), strict=True):
        for number, (name, group) in enumerate(by_method.items()):
            _draw_method(axes, f"C{number}", name, group)
        _label(axes, size, [run["loss"] for group in by_method.values() for run in group])
    device = ", ".join(sorted({session["device"] for session in results["sessions"]}))
    figure.suptitle(f"byte-level LLaMA on {device}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_method(axes: Any, color: str, name: str, group: list[Run]) -> None:
    drawn = [curve_of(run) for run in group]
    length = min(len(curve) for curve in drawn)
    curves = [[point[1] for point in curve[:length]] for curve in drawn]
    mean = [statistics.fmean(points) for points in zip(*curves, strict=True)]
    seen = [point[0] / 1e6 for point in drawn[0][:length]]
    seconds = [statistics.fmean(curve[i][2] for curve in drawn) for i in range(length)]
    label = f"{name}, lr {group[0]['lr']:g}, {len(group)} seed{'s' if len(group) > 1 else ''}"
    for axis, x in ((axes[0], seen), (axes[1], seconds)):
        axis.plot(x, mean, color=color, label=label)
        low, high = ([f(points) for points in zip(*curves, strict=True)] for f in (min, max))
        axis.fill_between(x, low, high, color=color, alpha=0.2)
    state = group[0]["state_bytes"] / 2**20
    loss = statistics.fmean(run["loss"] for run in group)
    last = group[0]["curve"][-1]
    for axis, x in ((axes[0], last[0] / 1e6), (axes[1], last[2])):
        axis.scatter(x, loss, color=color, marker="x")
    axes[2].scatter(state, loss, color=color)
    axes[2].annotate(name, (state, loss), textcoords="offset points", xytext=(5, 5))


def _label(axes: Any, size: str, losses: list[float]) -> None:
    names = ("million bytes of text", "seconds of training", "MiB of optimizer state")
    for axis, name in zip(axes, names, strict=True):
        axis.set_xlabel(name)
        axis.set_ylabel(f"{size}: validation loss, nats a byte")
        axis.grid(alpha=0.3)
    low = min(losses)
    for axis in axes[:2]:
        axis.set_ylim(low - 0.02, low + 0.5)
        axis.set_title("lines: 8 validation batches; x: all 48, at the end", fontsize=9)
    axes[0].legend()
