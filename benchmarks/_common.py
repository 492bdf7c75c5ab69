"""What every benchmark here needs: honest clocks, what the machine and the software were, and result files.

Rules that these functions serve: warm-up is timed apart and never part of a median; a step is timed between two
synchronisations of the device (a host clock alone would time the launches); every result file says which commit, which
versions, which machine and which command made it; and a result file is replaced whole, so that a run that is killed
leaves the rows that were finished.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

GIB = 1 << 30
ROOT = Path(__file__).resolve().parent.parent
SIZE_UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One step: `wall_s` between two synchronisations, `device_s` between two events (None on CPU)."""

    wall_s: float
    device_s: float | None


def time_step(step: Callable[[], None], device: str) -> StepTime:
    """Run `step` once and time it, the device idle before and after."""
    import torch

    if device == "cpu":
        begin = time.perf_counter()
        step()
        return StepTime(wall_s=time.perf_counter() - begin, device_s=None)
    begin_event, end_event = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    torch.cuda.synchronize()
    begin = time.perf_counter()
    begin_event.record()
    step()
    end_event.record()
    torch.cuda.synchronize()
    wall_s = time.perf_counter() - begin
    return StepTime(wall_s=wall_s, device_s=begin_event.elapsed_time(end_event) / 1e3)


def median(values: Sequence[float]) -> float | None:
    """Return the median, None of nothing."""
    return statistics.median(values) if values else None


def parse_bytes(text: str) -> int:
    """Return bytes of "118GiB" (GiB, MiB or KiB)."""
    for unit, factor in SIZE_UNITS.items():
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * factor)
    raise ValueError(
        f"{text!r} is no size here: write a number and one of {', '.join(SIZE_UNITS)}, such as 118GiB"
    )


def host_limit_bytes() -> int:
    """Return the memory this process may use: the cgroup's limit (version 2 or 1) or the machine's, the smaller."""
    import psutil

    limits: list[int] = [psutil.virtual_memory().total]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text))
    return min(limits)


def resident_bytes(pid: int | str = "self") -> int:
    """Return a process's resident set now, 0 when it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * resource.getpagesize()


def resident_peak_bytes() -> int:
    """Return the largest resident set this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=30, cwd=ROOT
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """Return MEMOPT_COMMIT (for a copied tree), else the commit checked out, "+changes" where the tree differs."""
    if named := os.environ.get("MEMOPT_COMMIT"):
        return named
    head = _output("git", "rev-parse", "HEAD")
    if not head:
        return "unknown"
    return head + (
        "+changes" if _output("git", "status", "--porcelain", "--untracked-files=no") else ""
    )


def versions(names: Iterable[str]) -> dict[str, str]:
    """Return the installed version of each distribution that is there, and of Python."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def nvidia_smi(*fields: str) -> dict[str, str]:
    """Return the named fields of the first GPU; empty without nvidia-smi."""
    text = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    values = text.splitlines()[0].split(", ") if text else []
    return dict(zip(fields, values, strict=False))


def cpu_model() -> str:
    """Return the processor's name as Linux gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def machine() -> dict[str, Any]:
    """Return what a reader must know of the machine."""
    return {
        "gpu": nvidia_smi("name", "memory.total", "driver_version"),
        "cpu": cpu_model(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "host_limit_bytes": host_limit_bytes(),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
    }


def command(argv: Sequence[str]) -> str:
    """Return the command as a reader may repeat it: of absolute paths, which are this machine's, the last part."""
    return shlex.join(
        ["python", *(Path(word).name if Path(word).is_absolute() else word for word in argv)]
    )


def provenance(packages: Iterable[str]) -> dict[str, Any]:
    """Return what made a result: time, command, commit, versions, machine."""
    return {
        "started_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command(sys.argv),
        "commit": commit(),
        "versions": versions(packages),
        "machine": machine(),
    }


def write_json(path: Path, value: object) -> None:
    """Replace `path` by `value`, whole: a reader or a kill never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; every column but the first two is aligned right."""
    rule = ["---" if column < 2 else "---:" for column in range(len(headers))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (headers, rule, *rows)) + "\n"
