"""Checks of storage: the I/O engines, each spill directory, and the rates that a probe kept."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memopt.cli.checks.base import Check, Context
from memopt.types.sizes import format_bytes

_SLOW_DISK = 500e6
"""Bytes per second that a SATA SSD reaches."""
_LITTLE_SPACE_BYTES = 10 << 30
_DRIFT = 0.25
"""Of a kept rate; drives and links repeat themselves within less."""


def engines(context: Context) -> Sequence[Check]:
    """Whether io_uring works, by writing and reading a real block; else the same of the threads engine."""
    from memopt.io import open_engine
    from memopt.io.uring import prove
    from memopt.types.errors import IoEngineUnavailable

    directory = _first_usable(context.ssd)
    figures: dict[str, Any] = {
        "directory": directory,
        "io_uring_disabled": context.read("proc/sys/kernel/io_uring_disabled"),
        "seccomp": _status(context, "Seccomp"),
        "kernel": os.uname().release,
    }
    try:
        open_engine("io_uring", directory=directory).close()
        figures["io_uring"] = True
        none = "no named directory can be used" if context.ssd else "no directory was named"
        where = directory or f"a memory file ({none})"
        found = f"io_uring: a block was written to {where} and read back"
        return [Check(name="I/O engine", status="ok", found=found, figures=figures)]
    except IoEngineUnavailable as error:
        reason = str(error)
    figures |= {"io_uring": False, "reason": reason}
    todo = uring_todo(reason, figures["io_uring_disabled"])
    try:
        with open_engine("threads") as engine:
            prove(engine, directory)
    except OSError as error:
        found = f"{reason}; threads: {error}"
        return [Check(name="I/O engine", status="broken", found=found, todo=todo, figures=figures)]
    found = f"threads (works, but takes Python's lock); {reason}"
    return [Check(name="I/O engine", status="weak", found=found, todo=todo, figures=figures)]


def _first_usable(requests: Sequence[str]) -> str | None:
    """Return the first directory that can be used, if any; what is wrong with the others is said elsewhere."""
    from memopt.cli.probe import parse_directories
    from memopt.types.errors import ConfigError

    for request in requests:
        with contextlib.suppress(ConfigError):
            return parse_directories([request])[0][0]
    return None


_BUILD_TODO = {
    "cffi": "install cffi again (pip install --force-reinstall cffi): _cffi_backend is a part of it",
    "native part": "install gcc and liburing's headers (liburing-dev, 2.3 or later), then install memopt again",
}
_KERNEL_TODO = {
    "no io_uring": "Linux 5.6 or later has io_uring",
    "seccomp": "allow io_uring_setup, io_uring_enter and io_uring_register in the container's seccomp profile "
    "(docker run --security-opt seccomp=PROFILE.json)",
    "security policy": "allow io_uring in the system's security policy (SELinux: ausearch -m avc shows the denial)",
}


def uring_todo(reason: str, disabled: str | None) -> str:
    """Return what makes io_uring work, given why it does not and the sysctl kernel.io_uring_disabled."""
    for word, todo in _BUILD_TODO.items():
        if word in reason:
            return todo
    if disabled in ("1", "2"):
        return (
            f"kernel.io_uring_disabled is {disabled}: sysctl kernel.io_uring_disabled=0 allows it to all, "
            "1 to members of kernel.io_uring_group"
        )
    for word, todo in _KERNEL_TODO.items():
        if word in reason:
            return todo
    return "io_uring refuses a test block: the reason above is the kernel's"


def _status(context: Context, name: str) -> str | None:
    for line in (context.read("proc/self/status") or "").splitlines():
        if line.startswith(f"{name}:"):
            return line.partition(":")[2].strip()
    return None


def directories(context: Context) -> Sequence[Check]:
    """Each spill directory that was named."""
    if not context.ssd:
        found = "no directory was named; memopt doctor --ssd DIR looks at one"
        return [Check(name="SSD", status="absent", found=found)]
    return [_directory(request, context) for request in context.ssd]


def _directory(request: str, context: Context) -> Check:
    from memopt.cli.probe import parse_directories
    from memopt.types.errors import ConfigError

    name = f"SSD {request}"
    try:
        path, size_bytes = parse_directories([request])[0]
    except ConfigError as error:
        todo = (
            "write --ssd DIR or DIR:SIZE: a directory that can be written, a size that fits into it"
        )
        return Check(name=name, status="broken", found=str(error), todo=todo)
    try:
        figures = _directory_facts(path, context)
        if not context.quick:
            figures |= _measure(path, size_bytes, context)
    except OSError as error:
        todo = "nothing can be spilled there: name another directory"
        return Check(name=name, status="broken", found=f"it cannot be written: {error}", todo=todo)
    return judge_directory(name, figures)


def _directory_facts(path: str, context: Context) -> dict[str, Any]:
    """Return the file system, its free space, and what direct I/O needs there, from a real unlinked file.

    Raises:
        OSError: no file can be made there.
    """
    from memopt.io import create_unlinked
    from memopt.io.files import direct_alignment
    from memopt.memory.host import inspect_directory
    from memopt.memory.mounts import mount_of

    facts = inspect_directory(path)
    figures: dict[str, Any] = {
        "path": path,
        "free_bytes": facts.free_bytes,
        "is_memory": facts.is_tmpfs,
        "file_system": None,
        "source": None,
        "is_network": False,
        "rotational": None,
    }
    try:
        mount = mount_of(path, proc=context.root / "proc/self")
    except (OSError, LookupError):
        pass  # the rest can be known without
    else:
        figures |= {
            "file_system": mount.kind,
            "source": mount.source,
            "is_network": mount.is_network,
            "rotational": _rotational(mount.device, context),
        }
    file = create_unlinked(path)
    try:
        align = direct_alignment(file.direct_fd) if file.is_direct else None
        figures |= {
            "direct": file.is_direct,
            "direct_reason": file.direct_reason,
            "memory_align_bytes": align.mem_bytes if align else None,
            "offset_align_bytes": align.offset_bytes if align else None,
        }
    finally:
        file.close()
    return figures


def _rotational(device: str, context: Context) -> bool | None:
    """Return whether the drive says that it spins, which virtual ones often do; a partition has no queue of its own."""
    base = Path("sys/dev/block") / device
    for place in (base / "queue", base / ".." / "queue"):
        text = context.read(str(place / "rotational"))
        if text is not None:
            return text == "1"
    return None


def _measure(path: str, size_bytes: int, context: Context) -> dict[str, Any]:
    from memopt._probing import PROBE_SSD_BYTES
    from memopt.io import ExtentStore
    from memopt.memory.rates import measure_disk

    with ExtentStore([(path, min(size_bytes, PROBE_SSD_BYTES))]) as store:
        rates = measure_disk(
            store,
            store.stats().budget_bytes,
            max_s=1.0,
            progress=lambda share: context.progress(path, share),
        )
        engine = store.engine
    context.measured[f"write {path}"] = rates.write_bytes_per_s
    context.measured[f"read {path}"] = rates.read_bytes_per_s
    return {
        "engine": engine.name,
        "queue_depth": engine.queue_depth,
        "write_bytes_per_s": rates.write_bytes_per_s,
        "read_bytes_per_s": rates.read_bytes_per_s,
        "probed_bytes": rates.probed_bytes,
    }


def judge_directory(name: str, figures: dict[str, Any]) -> Check:
    """Judge a directory that can be written."""
    from memopt.cli.probe import format_rate

    parts = [f"{figures['file_system'] or 'unknown file system'}"]
    if figures["source"]:
        parts[0] += f" on {figures['source']}"
    parts.append(f"{format_bytes(figures['free_bytes'])} free")
    if figures["direct"]:
        parts.append(
            f"O_DIRECT aligned to {figures['memory_align_bytes']} (memory) and "
            f"{figures['offset_align_bytes']} bytes (offset)"
        )
    else:
        parts.append(f"no O_DIRECT: {figures['direct_reason']}")
    if "write_bytes_per_s" in figures:
        parts.append(
            f"write {format_rate(figures['write_bytes_per_s'])}, read {format_rate(figures['read_bytes_per_s'])} "
            f"({figures['engine']}, {figures['queue_depth']} blocks in flight)"
        )
    todo = _directory_todo(figures)
    return Check(
        name=name,
        status="weak" if todo else "ok",
        found=", ".join(parts),
        todo=todo,
        figures=figures,
    )


def _directory_todo(figures: dict[str, Any]) -> str:
    """Return what to do about the first weak point; an empty string where there is none."""
    rates = [figures[key] for key in ("write_bytes_per_s", "read_bytes_per_s") if key in figures]
    weak_points = (
        (
            figures["is_memory"],
            "this is memory, and its bytes count as host memory: name a directory on a disk",
        ),
        (figures["is_network"], "a network file system: name a directory on a local drive"),
        (
            figures["file_system"] == "overlay",
            "a container's own layer: mount a directory of the host's drive (docker run -v) and name that",
        ),
        (
            not figures["direct"],
            "writes go through the page cache and cost host memory: ext4 or XFS have direct I/O",
        ),
        (
            figures["free_bytes"] < _LITTLE_SPACE_BYTES,
            "little space: free some, or name a directory on another drive",
        ),
        (
            bool(rates) and min(rates) < _SLOW_DISK,
            "slower than a SATA SSD, so recomputing will beat it: name an NVMe drive, or several drives",
        ),
    )
    return next((todo for weak, todo in weak_points if weak), "")


def cache(context: Context) -> Sequence[Check]:
    """Whether sessions here find rates that a probe kept, and whether these still hold."""
    import torch

    from memopt._probing import KeptRates
    from memopt.cli.probe import parse_directories
    from memopt.io import open_engine
    from memopt.memory.probe_cache import ProbeCache
    from memopt.types.errors import ConfigError

    name = "probe cache"
    store = ProbeCache.from_environment()
    if store.directory is None:
        why = store.notes[0] if store.notes else "MEMOPT_CACHE=off"
        found = f"off ({why}): every session measures for itself"
        return [Check(name=name, status="absent", found=found)]
    try:
        paths = [path for path, _ in parse_directories(context.ssd)]
    except ConfigError:
        paths = []  # what is wrong with it is said of the directory itself
    device = torch.device("cuda", context.gpus[0].index) if context.gpus else torch.device("cpu")
    with open_engine("auto") as engine:
        kept = KeptRates.find(device, paths, engine.name, store)
    rates = {} if kept.link is None else dict(kept.link.rates)
    if kept.ssd is not None and len(paths) == 1:
        rates |= {
            f"{verb} {paths[0]}": kept.ssd.rates[f"{verb}_bytes_per_s"]
            for verb in ("write", "read")
        }
    figures = {
        "directory": str(store.directory),
        "writable": _can_write(store.directory),
        "link": None if kept.link is None else kept.link.path,
        "ssd": None if kept.ssd is None else kept.ssd.path,
        "drift": drift(rates, context.measured),
        "notes": list(kept.notes),
    }
    return [judge_cache(figures, paths)]


def drift(kept: dict[str, float], measured: dict[str, float]) -> dict[str, float]:
    """Return measured / kept - 1 of every rate that was measured just now."""
    return {name: measured[name] / kept[name] - 1 for name in measured if kept.get(name)}


def judge_cache(figures: dict[str, Any], paths: Sequence[str]) -> Check:
    """Judge what is kept: readable, for this machine, and near what was measured just now."""
    have = [what for what in ("link", "ssd") if figures[what]]
    lack = [what for what in ("link", "ssd") if not figures[what] and (what == "link" or paths)]
    found = f"{figures['directory']}: "
    found += (
        f"rates of {' and '.join(have)} are kept" if have else "nothing is kept for this machine"
    )
    off = {name: share for name, share in figures["drift"].items() if abs(share) > _DRIFT}
    command = "memopt probe" + "".join(f" --ssd {path}" for path in paths)
    todo = ""
    if figures["notes"]:
        found += f"; {figures['notes'][0]}"
        todo = f"delete that file, or replace it: {command}"
    elif off:
        worst = max(off, key=lambda name: abs(off[name]))
        found += f"; {worst} is {off[worst]:+.0%} of what is kept"
        todo = f"was something else running, then or now? measure again: {command} --fresh"
    elif not figures["writable"]:
        found += "; it cannot be written"
        todo = "name a directory that can be written in MEMOPT_CACHE, or MEMOPT_CACHE=off"
    elif lack:
        found += f"; sessions measure the {' and '.join(lack)} themselves ({command} keeps it)"
    return Check(
        name="probe cache",
        status="weak" if todo else "ok" if have else "absent",
        found=found,
        todo=todo,
        figures=figures,
    )


def _can_write(directory: Path) -> bool:
    """Return whether files could be made in `directory`, which need not exist yet."""
    place = directory
    while not place.exists() and place != place.parent:
        place = place.parent
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)
