"""Ratios within one run, and its rows as Markdown and on the console."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from _common import GIB, markdown_table

if TYPE_CHECKING:
    from rich.table import Table

HEADERS = (
    "tokens",
    "method",
    "step s",
    "/ plain",
    "/ checkpoint",
    "peak allocated GiB",
    "peak reserved GiB",
    "host pinned GiB",
    "resident GiB",
    "first steps s",
    "loss",
)
Result = dict[str, Any]


def pinned_bytes(row: Result) -> int | None:
    """Return the host bytes a method pinned: what PyTorch's host allocator held plus memopt's own buffers."""
    report = (row.get("method_report") or {}).get("report") or {}
    own = (report.get("measured") or {}).get("host_bytes")
    known = [value for value in (row.get("torch_pinned_bytes"), own) if value is not None]
    return sum(known) if known else None


def add_ratios(rows: list[Result]) -> None:
    """Fill each finished row's ratios to the plain and the checkpointed step of the same run and length."""
    for row in rows:
        for name in ("plain", "checkpoint"):
            base = _of(rows, row["tokens"], name)
            known = base is not None and base.get("median_step_s") and row.get("median_step_s")
            row[f"ratio_to_{name}"] = (
                row["median_step_s"] / base["median_step_s"] if known and base else None
            )
        row["host_pinned_bytes"] = pinned_bytes(row)
        row["loss_agrees"] = _loss_agrees(rows, row)


def _of(rows: list[Result], tokens: int, method: str) -> Result | None:
    found = (
        row
        for row in rows
        if row["tokens"] == tokens and row["method"] == method and row["status"] == "ok"
    )
    return next(found, None)


def _loss_agrees(rows: list[Result], row: Result) -> bool | None:
    """Say whether every step's loss is, to the bit, that of the plain step (where it did not run, the checkpointed)."""
    base = _of(rows, row["tokens"], "plain") or _of(rows, row["tokens"], "checkpoint")
    if base is None or base is row or not row.get("losses"):
        return None
    return set(row["losses"]) == set(base["losses"])


def _gib(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / GIB:.1f}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def cells(row: Result) -> list[str]:
    """Return one line of the table; a row that did not finish says why."""
    agrees = {True: "same", False: "DIFFERS", None: ""}[row.get("loss_agrees")]
    step = _number(row.get("median_step_s"), 3)
    if row["status"] != "ok":
        step = f"{step} {row['status']}".strip()
    return [
        f"{row['tokens']:,}",
        row["label"],
        step,
        _number(row.get("ratio_to_plain"), 3),
        _number(row.get("ratio_to_checkpoint"), 3),
        _gib(row.get("peak_allocated_bytes")),
        _gib(row.get("peak_reserved_bytes")),
        _gib(row.get("host_pinned_bytes")),
        _gib(row.get("resident_peak_bytes")),
        ", ".join(f"{seconds:.2f}" for seconds in row.get("untimed_step_s", ())),
        agrees,
    ]


def _ordered(run: Result) -> list[Result]:
    return sorted(run["rows"], key=lambda row: row["tokens"])  # stable: importance within a length


def markdown(result: Result) -> str:
    """Return every run of a result file as a table with its machine, versions and reasons."""
    parts = ["# Activation memory: step time against peak\n"]
    for run in result["runs"]:
        machine, rows = run["machine"], _ordered(run)
        gpu = machine["gpu"].get("name", "no GPU")
        held = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        attention = sorted({op for row in rows for op in row.get("attention", ())})
        parts.append(f"## {run['started_utc']} on {gpu}\n")
        parts.append(
            f"Commit {run['commit'][:12]}; {held}. Attention: {', '.join(attention) or 'not recorded'}.\n"
        )
        parts.append(f"`{run['command']}`\n")
        parts.append(markdown_table(HEADERS, [cells(row) for row in rows]))
        parts += [
            f"- {row['tokens']:,} {row['label']}: {row['status']}: {row['reason']}"
            for row in rows
            if row.get("reason")
        ]
        parts.append("")
    return "\n".join(parts)


def console_table(run: Result) -> Table:
    """Return one run's rows for the terminal."""
    from rich.table import Table

    table = Table(
        title=f"activations on {run['machine']['gpu'].get('name', 'no GPU')}", title_justify="left"
    )
    for header in HEADERS:
        table.add_column(header, justify="left" if header == "method" else "right")
    for row in _ordered(run):
        table.add_row(*cells(row))
    return table
