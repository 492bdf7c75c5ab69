"""The command `memopt`. Each command lives in its own file; every one has `--json`.

People get tables and progress bars; `--json` prints one JSON document on stdout and nothing else there.
A mistake of the user ends with one line on stderr and exit status 2, a run that failed with 1.
"""

from __future__ import annotations

from typing import Any

import click

import memopt
from memopt.cli.demo import demo_command
from memopt.cli.doctor import doctor_command
from memopt.cli.probe import probe_command
from memopt.cli.report import report_command
from memopt.types.errors import ConfigError


class _Group(click.Group):
    """A group whose commands may raise ConfigError: a mistake, not a crash."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; turn a ConfigError into click's own usage error."""
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            raise click.UsageError(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(memopt.__version__, prog_name="memopt")
def main() -> None:
    """Train inside a byte budget: device, host and SSD."""


main.add_command(demo_command)
main.add_command(doctor_command)
main.add_command(probe_command)
main.add_command(report_command)

__all__ = ["main"]
