"""The one table of a run: budget, prediction and measurement side by side, then what moved."""

from __future__ import annotations

import io
import shutil
from typing import TYPE_CHECKING

from memopt.types.report import Footprint, RunReport
from memopt.types.sizes import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

MISSING = "-"
MAX_PLACEMENT_ROWS = 12
_MIN_WIDTH, _MAX_WIDTH = 60, 110


def format_seconds(seconds: float | None) -> str:
    """Return seconds with three digits: "1.73 s", "12.3 ms"; a dash for None."""
    if seconds is None:
        return MISSING
    if seconds >= 100:
        return f"{seconds:.0f} s"
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms"


def format_days(days: float) -> str:
    """Return days, above two years as years: "22.1 days", "4.1 years"."""
    if days >= 730:
        return f"{days / 365.25:,.1f} years"
    return f"{days:.3g} days" if days < 100 else f"{days:.0f} days"


def _bytes(num_bytes: int | None) -> str:
    return MISSING if num_bytes is None else format_bytes(num_bytes)


def _difference(predicted: float | None, measured: float | None) -> str:
    """Return how far the measurement lies from the prediction, in percent of the measurement."""
    if not predicted or not measured:
        return ""
    return f"{(predicted / measured - 1) * 100:+.1f} %"


def report_table(report: RunReport) -> Table:
    """Return the table as rich draws it."""
    from rich.table import Table

    table = Table(
        title=f"memopt: {report.num_steps} steps on {report.device}", title_justify="left"
    )
    table.add_column("")
    for column in ("plain step", "budget", "predicted", "measured", "prediction off by"):
        table.add_column(column, justify="right")
    _add_footprints(table, report)
    table.add_section()
    _add_beside(table, report)
    table.add_section()
    _add_moved(table, report)
    _add_placements(table, report)
    if report.notes:
        table.caption = "\n".join(f"note: {note}" for note in report.notes)
        table.caption_justify = "left"
    return table


def _add_footprints(table: Table, report: RunReport) -> None:
    budgets = {
        "device": report.budget.device_bytes,
        "host": report.budget.host_bytes or None,
        "ssd": report.budget.ssd_bytes or None,
    }
    for place, budget_bytes in budgets.items():
        plain, predicted, measured = (
            getattr(footprint, f"{place}_bytes")
            for footprint in (report.baseline, report.predicted, report.measured)
        )
        table.add_row(
            f"{place} peak" if place != "ssd" else "SSD peak",
            _bytes(plain),
            _bytes(budget_bytes),
            _bytes(predicted),
            _bytes(measured),
            _difference(predicted, measured),
        )
    steps: tuple[Footprint, ...] = (report.baseline, report.predicted, report.measured)
    plain_s, predicted_s, measured_s = (format_seconds(footprint.step_s) for footprint in steps)
    planned = report.num_planned_steps != 0  # else no step is what was predicted
    off = _difference(report.predicted.step_s, report.measured.step_s) if planned else ""
    table.add_row(_median_label(report), plain_s, "", predicted_s, measured_s, off)


def _median_label(report: RunReport) -> str:
    """Say which steps the median is of."""
    num = report.num_planned_steps
    if num is None or report.measured.step_s is None:
        return "median step"
    return f"median of {num} planned step{'s' * (num != 1)}" if num else "median, before the plan"


def _add_beside(table: Table, report: RunReport) -> None:
    """What is measured only."""
    rows = [
        ("first step", format_seconds(report.first_step_s)),
        ("exposed time per step", format_seconds(report.exposed_s)),
        ("resident set, peak", _bytes(report.resident_bytes)),
    ]
    if report.device_reserved_bytes is not None:
        rows.append(("reserved by PyTorch, peak", _bytes(report.device_reserved_bytes)))
    if report.device_context_bytes is not None:
        rows.append(("CUDA context", _bytes(report.device_context_bytes)))
    for label, measured in rows:
        table.add_row(label, "", "", "", measured, "")


def _add_moved(table: Table, report: RunReport) -> None:
    moved = report.moved
    directions = {
        "device to host": moved.d2h_bytes,
        "host to device": moved.h2d_bytes,
        "written to SSD": moved.ssd_write_bytes,
        "read from SSD": moved.ssd_read_bytes,
    }
    for label, num_bytes in directions.items():
        if num_bytes:
            table.add_row(label, "", "", "", format_bytes(num_bytes), "")
    if not any(directions.values()):
        table.add_row("moved", "", "", "", "nothing", "")
    _add_wear(table, report)


def _add_wear(table: Table, report: RunReport) -> None:
    """One line: per step, rated, per day, and how long the drives last."""
    wear = report.wear
    if wear is None or not wear.step_bytes:
        return
    table.add_row(
        f"SSD: {format_bytes(wear.step_bytes)} a step",
        "",
        "" if wear.endurance_bytes is None else f"{format_bytes(wear.endurance_bytes)} rated",
        "",
        f"{_bytes(wear.day_bytes)} a day",
        "" if wear.lifetime_days is None else f"lasts {format_days(wear.lifetime_days)}",
    )


def _add_placements(table: Table, report: RunReport) -> None:
    """Largest first; a long tail is one row per placement."""
    rows = sorted(report.placements, key=lambda row: -row.size_bytes)
    if not rows:
        return
    table.add_section()
    for row in rows[:MAX_PLACEMENT_ROWS]:
        label = f"{row.num_outputs} x {row.kind}"
        table.add_row(label, "", "", row.placement, format_bytes(row.size_bytes), "")
    rest = rows[MAX_PLACEMENT_ROWS:]
    for placement in sorted({row.placement for row in rest}):
        same = [row for row in rest if row.placement == placement]
        label = f"{sum(row.num_outputs for row in same)} x other"
        size = format_bytes(sum(row.size_bytes for row in same))
        table.add_row(label, "", "", placement, size, "")


def render_text(report: RunReport) -> str:
    """Return the table as text as wide as the terminal, without colour codes (it may go to a log)."""
    from rich.console import Console

    width = max(_MIN_WIDTH, min(_MAX_WIDTH, shutil.get_terminal_size((_MAX_WIDTH, 24)).columns))
    out = io.StringIO()
    console = Console(
        file=out, width=width, color_system=None, highlight=False, markup=False, emoji=False
    )
    console.print(report_table(report))
    return out.getvalue().rstrip("\n")
