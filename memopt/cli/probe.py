"""`memopt probe`: measure this machine for the planner, and keep the figures for sessions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.table import Table

    from memopt._probing import ProbeResult, Progress
    from memopt.io import EngineName

FC = TypeVar("FC", bound=Callable[..., Any])
_LEAST_BYTES = 4096
"""One block: a disk with less room is full."""


def ssd_option(several: str) -> Callable[[FC], FC]:
    """Return the option that names directories; `several` says what becomes of more than one."""
    return click.option(
        "--ssd",
        "ssd",
        multiple=True,
        metavar="DIR[:SIZE]",
        help=f"A spill directory, as in memopt.Budget; at most SIZE bytes are written. {several}",
    )


@click.command("probe", short_help="Measure link and spill directories for sessions.")
@ssd_option("Several are measured one by one, then together.")
@click.option("--device", default=None, help="cuda, cuda:N or cpu; default: the first CUDA device.")
@click.option(
    "--engine",
    type=click.Choice(["auto", "io_uring", "threads"]),
    default="auto",
    show_default=True,
    help="I/O engine; rates are kept per engine.",
)
@click.option("--fresh", is_flag=True, help="Measure also what is kept from an earlier probe.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON; progress goes to stderr."
)
def probe_command(
    ssd: tuple[str, ...], device: str | None, engine: str, *, fresh: bool, as_json: bool
) -> None:
    """Measure link, page-locking and spill directories, and keep the rates for sessions on this machine."""
    from rich.console import Console

    from memopt._probing import probe

    directories = parse_directories(ssd)
    people = Console(stderr=True)
    with progress_of(people) as progress:
        try:
            result = probe(
                parse_device(device),
                directories,
                engine=cast("EngineName", engine),
                fresh=fresh,
                progress=progress,
            )
        except (OSError, RuntimeError) as error:  # RuntimeError: memopt's own and CUDA's
            raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps({"format": "memopt-probe-result-1", **result.to_dict()}))
        return
    out = Console(markup=False, emoji=False, highlight=False)  # a path stays what it is
    out.print(probe_table(result))
    for note in result.notes:
        out.print(f"note: {note}", soft_wrap=True)


def parse_device(name: str | None) -> torch.device:
    """Return the device to measure.

    Raises:
        ConfigError: there is no such device here.
    """
    import torch

    from memopt.types.errors import ConfigError

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name!r} is no device: write cuda, cuda:N or cpu") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type not in ("cuda", "cpu") or (
        device.type == "cuda" and (device.index or 0) >= count
    ):
        raise ConfigError(f"--device {name!r}: there is cpu here, and {count} CUDA devices")
    return device


def parse_directories(requests: Sequence[str]) -> list[tuple[str, int]]:
    """Return (directory, bytes that may be written) of each DIR or DIR:SIZE.

    Raises:
        ConfigError: a directory that is missing or cannot be written, or a size without sense.
    """
    import warnings

    from memopt._probing import PROBE_SSD_BYTES
    from memopt.memory.host import inspect_directory, resolve_budget
    from memopt.types.budget import Budget
    from memopt.types.errors import ConfigError

    spelled = []
    for request in requests:
        if not request.strip():
            raise ConfigError(f"--ssd {request!r} names no directory; write DIR or DIR:SIZE")
        directory = Path(request).expanduser()
        if directory.is_dir():
            free_bytes = inspect_directory(str(directory)).free_bytes
            size_bytes = min(PROBE_SSD_BYTES, free_bytes // 4)
            if size_bytes < _LEAST_BYTES:
                raise ConfigError(
                    f"--ssd {request}: the disk is full ({free_bytes} bytes are free); free some space, "
                    "or name a directory on another disk"
                )
            spelled.append(f"{request}:{size_bytes}B")
        elif ":" in request:  # what is wrong with it, resolving says
            spelled.append(request)
        else:
            wrong = (
                "is not a directory" if directory.exists() else "does not exist; create it first"
            )
            raise ConfigError(f"--ssd {request}: {directory} {wrong}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of directories in memory; the result says so
            budget = resolve_budget(
                Budget(ssd=spelled),
                device_free_bytes=0,
                device_total_bytes=0,
                device_is_host=True,
            )
    except ConfigError as error:  # in the words of the command line, not of Budget
        text = str(error)
        for request, spelling in zip(requests, spelled, strict=True):
            text = text.replace(f"ssd={spelling!r}", f"--ssd {request}")
        raise ConfigError(text) from None
    return [(directory.path, directory.size_bytes) for directory in budget.ssd]


@contextmanager
def progress_of(people: Console) -> Iterator[Progress]:
    """Show what is being measured on stderr while it is; nothing stays, and nothing is written to a log."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("measuring {task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=people, transient=True, disable=not people.is_terminal
    ) as progress:
        task = progress.add_task("the machine", total=1.0)

        def tell(label: str, share: float) -> None:
            progress.update(task, description=label, completed=share)

        yield tell


def format_rate(bytes_per_s: float) -> str:
    """Return a rate in decimal units, as drives and links are sold: "55.1 GB/s"; a dash for 0."""
    if bytes_per_s <= 0:
        return "-"
    if bytes_per_s >= 1e9:
        return f"{bytes_per_s / 1e9:.3g} GB/s"
    return f"{bytes_per_s / 1e6:.3g} MB/s"


def probe_table(result: ProbeResult) -> Table:
    """Return the result as rich draws it."""
    from rich.table import Table

    hardware = result.hardware
    title = hardware.device if hardware.name == hardware.device else hardware.name
    table = Table(title=f"memopt probe: {title}", title_justify="left")
    table.add_column("")
    table.add_column("rate", justify="right")
    table.add_column("figures")
    for label, rate in _link_rows(result):
        table.add_row(label, format_rate(rate), result.link_provenance)
    for some in result.ssd:
        where = " + ".join(some.paths)
        for verb, rate in (
            ("write", some.rates.write_bytes_per_s),
            ("read", some.rates.read_bytes_per_s),
        ):
            how = f"{some.engine}, {some.queue_depth} in flight"
            table.add_row(f"{verb} {where} ({how})", format_rate(rate), some.provenance)
    off = "" if any("not kept" in note for note in result.notes) else ": the cache is off"
    table.caption = f"kept in {result.kept_in}" if result.kept_in else f"not kept{off}"
    table.caption_justify = "left"
    return table


def _link_rows(result: ProbeResult) -> list[tuple[str, Any]]:
    link = result.link
    if result.hardware.device != "cuda":
        return [("copies in host memory", link.d2h_bytes_per_s)]
    return [
        ("device to host", link.d2h_bytes_per_s),
        ("host to device", link.h2d_bytes_per_s),
        ("both at once, together", link.duplex_bytes_per_s),
        ("page-locking host memory", result.page_locking.bytes_per_s),
    ]
