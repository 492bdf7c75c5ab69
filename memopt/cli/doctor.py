"""`memopt doctor`: one screen on what this machine gives memopt, and what to do where it is weak.

Exit status 0: nothing is broken; weak points, things this machine does not have and questions that found no answer do
not count. 1: something that memopt needs does not work at all (a package is missing or too old, CUDA does not start
although its driver is loaded, a directory that was named cannot be written, no I/O engine works). 2: a wrong option.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from memopt.cli.probe import ssd_option

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from memopt.cli.checks import Check, Context

FORMAT = "memopt-doctor-1"
_MARKS = {
    "ok": ("ok", "green"),
    "weak": ("weak", "yellow"),
    "broken": ("BROKEN", "bold red"),
    "absent": ("-", "dim"),
    "unknown": ("?", "magenta"),
}


@click.command("doctor", short_help="Show what this machine gives memopt.")
@ssd_option("Several are looked at one by one.")
@click.option("--quick", is_flag=True, help="Do not measure rates.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the answers as JSON; progress goes to stderr."
)
@click.pass_context
def doctor_command(
    click_context: click.Context, ssd: tuple[str, ...], *, quick: bool, as_json: bool
) -> None:
    """Show what this machine gives memopt, and what to do where it is weak; status 1 if something is broken."""
    from rich.console import Console

    from memopt.cli.checks import run_checks
    from memopt.cli.probe import progress_of

    with progress_of(Console(stderr=True)) as progress:
        context = make_context(ssd, quick=quick)
        context.progress = progress
        checks = run_checks(context)
    if as_json:
        click.echo(json.dumps(to_document(checks, quick=quick)))
    else:
        show(checks, Console(markup=False, emoji=False, highlight=False))
    click_context.exit(int(any(check.status == "broken" for check in checks)))


def make_context(ssd: Sequence[str], *, quick: bool) -> Context:
    """Return what the checks look at: this machine."""
    from memopt.cli.checks import Context
    from memopt.cli.checks.device import find_gpus

    try:
        gpus, problem = find_gpus()
    except Exception as error:  # noqa: BLE001 - a torch that does not load raises anything, and is a finding
        gpus, problem = (), f"{type(error).__name__}: {error}"
    return Context(quick=quick, ssd=ssd, gpus=gpus, gpu_problem=problem)


def to_document(checks: Sequence[Check], *, quick: bool) -> dict[str, object]:
    """Return the answers as one JSON document."""
    counts = {status: sum(check.status == status for check in checks) for status in _MARKS}
    return {
        "format": FORMAT,
        "ok": counts["broken"] == 0,
        "quick": quick,
        "counts": counts,
        "checks": [check.to_dict() for check in checks],
    }


def show(checks: Sequence[Check], out: Console) -> None:
    """Print the table, then what to do."""
    out.print(doctor_table(checks))
    todos = [check for check in checks if check.todo]
    if todos:
        out.print("What to do:")
    for check in todos:
        line = f"  {check.name}: {check.todo}"
        out.print(line, soft_wrap=True)
    if not todos:
        out.print("Nothing to do.")


def doctor_table(checks: Sequence[Check]) -> Table:
    """Return the answers as rich draws them."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="memopt doctor", title_justify="left")
    for column in ("", "", "found"):
        table.add_column(column, overflow="fold")
    for check in checks:
        mark, style = _MARKS[check.status]
        table.add_row(Text(mark, style=style), Text(check.name), Text(check.found))
    return table
