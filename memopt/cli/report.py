"""`memopt report FILE`: show a saved report."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("report", short_help="Show a saved report.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def report_command(file: Path, *, as_json: bool) -> None:
    """Show the report in FILE (written by `run.report().save(FILE)`)."""
    from memopt.report import RunReport

    loaded = RunReport.load(file)
    click.echo(json.dumps(loaded.to_dict()) if as_json else str(loaded))
