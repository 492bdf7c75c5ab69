"""`memopt demo`: one small Llama trained twice, plain and in 40 % of the plain run's memory.

The claim is checked, not shown: the command fails if one loss or one weight differs by one bit, or if the run under
memopt held more live tensor bytes than its budget. Each run has a process of its own (`demo_worker`), since memory that
a process has once touched would otherwise be counted for the run that comes second.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memopt.types.sizes import format_bytes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from memopt.cli.demo_worker import DemoConfig

_NEEDS = ("transformers", "matplotlib")


@click.command("demo", short_help="Train a small Llama plain and in 40 % of the memory.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("memopt_demo"),
    show_default=True,
    help="Directory for the picture, the report and the figures; memopt spills to it while it runs.",
)
@click.option(
    "--steps", type=click.IntRange(min=2), default=8, show_default=True, help="Steps per run."
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Compute threads of both runs; without it half of the CPUs that are idle now, at most 8.",
)
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.4,
    show_default=True,
    help="Device budget as a share of the plain run's accounted peak.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON; progress goes to stderr."
)
def demo_command(
    output: Path, steps: int, threads: int | None, share: float, *, as_json: bool
) -> None:
    """Train a small Llama plain and in 40 % of the memory; compare them bit by bit."""
    from rich.console import Console

    _check_extras()
    from memopt.cli.demo_worker import DemoConfig

    _check_output(output)
    people = Console(stderr=as_json)
    config = DemoConfig(num_steps=steps, num_threads=threads or sensible_threads())
    result = run_both(config, share, output.resolve(), people)
    _write(result, output)
    if as_json:
        click.echo(json.dumps(summary(result)))
    else:
        _show(result, output, people)
    if not (result["losses_equal"] and result["weights_equal"] and result["within_budget"]):
        raise click.ClickException(_what_failed(result))


def sensible_threads() -> int:
    """Return half of the CPUs that are idle now, from 1 to 8.

    The threads of an op wait for each other at its end. Where another program holds one of their
    CPUs all wait for that one: with two threads on two busy CPUs a step took three times as long as
    with one thread (benchmarks/LOG.md).
    """
    from memopt.memory.machine import num_idle_cpus

    return max(1, min(8, int(num_idle_cpus()) // 2))


def _check_extras() -> None:
    import importlib.util

    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise click.UsageError(
            f"the demo needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )


def _check_output(output: Path) -> None:
    import tempfile

    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise click.UsageError(
            f"--output {output}: {error.strerror}; name a directory that can be written"
        ) from error


def run_both(config: DemoConfig, share: float, output: Path, people: Console) -> dict[str, Any]:
    """Run plain, then memopt in `share` of the plain peak; return both runs and the comparison."""
    plain = run_worker(config, "plain", people)
    budget_bytes = math.floor(share * plain["accounted_peak_bytes"])
    ours_config = replace(
        config,
        device_bytes=budget_bytes,
        ssd=f"{output}:{plain['accounted_peak_bytes']}B",  # more could never be spilled
        report_file=str(output / "report.json"),
    )
    ours = run_worker(ours_config, "memopt", people)
    return {
        "num_parameters": plain["num_parameters"],
        "versions": plain["versions"],
        "num_threads": plain["num_threads"],
        "tokens_per_step": config.batch_size * config.sequence_length,
        "share": share,
        "budget_bytes": budget_bytes,
        "losses_equal": _bits(plain["losses"]) == _bits(ours["losses"]),
        "weights_equal": plain["weights_digest"] == ours["weights_digest"],
        "within_budget": ours["accounted_peak_bytes"] <= budget_bytes,
        "plain": plain,
        "memopt": ours,
    }


def _bits(losses: list[float]) -> list[str]:
    return [loss.hex() for loss in losses]


def run_worker(config: DemoConfig, name: str, people: Console) -> dict[str, Any]:
    """Run one worker to its end behind a progress bar; return its figures.

    Raises:
        click.ClickException: the worker failed; the message ends with what it wrote to stderr.

    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn(f"{name:>6}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, console=people) as progress:
        task = progress.add_task(name, total=config.num_steps, loss="")

        def stepped(event: dict[str, Any]) -> None:
            progress.update(task, advance=1, loss=f"loss {event['loss']:.4f}")

        return _follow(config, name, stepped)


def _follow(
    config: DemoConfig, name: str, stepped: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    import tempfile

    from memopt.cli.demo_worker import command

    figures: dict[str, Any] = {"losses": [], "step_s": [], "cpu_s": []}
    with (
        tempfile.TemporaryFile("w+") as errors,  # a file cannot fill up and block as a pipe can
        subprocess.Popen(
            command(config), stdout=subprocess.PIPE, stderr=errors, text=True
        ) as worker,
    ):
        try:
            assert worker.stdout is not None
            for line in worker.stdout:
                event = json.loads(line)
                kind = event.pop("event")
                if kind == "refused":
                    raise click.ClickException(f"the {name} run was refused: {event['message']}")
                if kind == "step":
                    figures["losses"].append(event["loss"])
                    figures["step_s"].append(event["step_s"])
                    figures["cpu_s"].append(event["cpu_s"])
                    stepped(event)
                else:
                    figures.update(event)
        except BaseException:
            worker.terminate()
            raise
        if worker.wait() != 0 or "weights_digest" not in figures:
            errors.seek(0)
            tail = errors.read()[-3000:]
            raise click.ClickException(
                f"the {name} run ended with status {worker.returncode}\n{tail}"
            )
    return figures


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Return the result without the samples over time."""
    short = dict(result)
    for name in ("plain", "memopt"):
        short[name] = {key: value for key, value in result[name].items() if key != "samples"}
    return short


def _write(result: dict[str, Any], output: Path) -> None:
    from memopt.cli.demo_figure import draw

    (output / "demo.json").write_text(json.dumps(result) + "\n")
    draw(
        {name: result[name] for name in ("plain", "memopt")},
        result["budget_bytes"],
        output / "memory.png",
    )


def loss_table(result: dict[str, Any]) -> Table:
    """Return both loss curves side by side, a bar per step, and whether the bits agree."""
    from rich.table import Table

    table = Table(title="loss", title_justify="left")
    table.add_column("step", justify="right")
    for name in ("plain", "memopt"):
        table.add_column(name, justify="right")
        table.add_column("")
    table.add_column("same bits")
    pairs = zip(result["plain"]["losses"], result["memopt"]["losses"], strict=True)
    highest = max(result["plain"]["losses"])
    for step, pair in enumerate(pairs):
        cells = [
            cell for loss in pair for cell in (f"{loss:.7f}", "#" * round(14 * loss / highest))
        ]
        table.add_row(str(step), *cells, "yes" if pair[0].hex() == pair[1].hex() else "NO")
    return table


def memory_table(result: dict[str, Any]) -> Table:
    """Return peaks and times of both runs and what memopt's are of the plain ones."""
    from rich.table import Table

    plain, ours = result["plain"], result["memopt"]
    millions = result["num_parameters"] / 1e6
    title = f"{millions:.1f} M parameters, {result['tokens_per_step']:,} tokens a step"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("plain", "memopt", "memopt / plain"):
        table.add_column(column, justify="right")
    table.add_row(
        "device budget", "-", format_bytes(result["budget_bytes"]), f"{result['share']:.2f}"
    )
    for label, key in (
        ("accounted peak", "accounted_peak_bytes"),
        ("resident peak", "resident_peak_bytes"),
    ):
        share = f"{ours[key] / plain[key]:.2f}"
        table.add_row(label, format_bytes(plain[key]), format_bytes(ours[key]), share)
    times = {
        "median step": tuple(_median_s(run["step_s"][1:]) for run in (plain, ours)),
        "median step, CPU time": tuple(_median_s(run["cpu_s"][1:]) for run in (plain, ours)),
        "first step": tuple(run["step_s"][0] for run in (plain, ours)),
        "all steps": (plain["train_s"], ours["train_s"]),
    }
    for label, (plain_s, ours_s) in times.items():
        table.add_row(label, f"{plain_s:.2f} s", f"{ours_s:.2f} s", f"{ours_s / plain_s:.2f}")
    return table


def _median_s(seconds: list[float]) -> float:
    import statistics

    return statistics.median(seconds)


def _show(result: dict[str, Any], output: Path, people: Console) -> None:
    from memopt.report import RunReport

    people.print(loss_table(result))
    people.print(memory_table(result))
    click.echo(str(RunReport.load(output / "report.json")))
    if result["losses_equal"] and result["weights_equal"]:
        people.print("Every loss and every weight is the same to the last bit.")
    people.print(
        f"Memory over time: {output / 'memory.png'}; all figures: {output / 'demo.json'}",
        soft_wrap=True,
    )


def _what_failed(result: dict[str, Any]) -> str:
    problems = []
    if not result["losses_equal"]:
        problems.append("the losses differ")
    if not result["weights_equal"]:
        problems.append("the weights differ after the last step")
    if not result["within_budget"]:
        peak = format_bytes(result["memopt"]["accounted_peak_bytes"])
        problems.append(
            f"the peak, {peak}, is above the budget, {format_bytes(result['budget_bytes'])}"
        )
    return "; ".join(problems)
