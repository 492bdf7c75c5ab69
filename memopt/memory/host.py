"""Facts of host memory and of spill directories: what this process may use, what it uses, where it may write.

The limit that counts is the cgroup's, not the machine's: in a container `free` shows memory that the kernel will kill
for. Every level from the process's own cgroup up to the root may set a limit, so the least room of all levels is what
is left. A level's usage contains page cache that the kernel drops under pressure; like Kubernetes' working set, the
inactive part of it is not counted as used.

cgroup v2: Linux Documentation/admin-guide/cgroup-v2.rst; v1: Documentation/admin-guide/cgroup-v1/memory.rst.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from memopt.memory.mounts import unescape
from memopt.types.budget import Budget, DirectoryFacts, HostFacts, ResolvedBudget

# f_type of file systems that are memory: linux/magic.h
_TMPFS_MAGIC = 0x01021994
_RAMFS_MAGIC = 0x858458F6


@dataclass(frozen=True, kw_only=True)
class _CgroupFiles:
    """Where one version of cgroups keeps what we read."""

    limit: str
    usage: str
    inactive: str  # key in memory.stat: page cache that can be dropped


_V1 = _CgroupFiles(
    limit="memory.limit_in_bytes", usage="memory.usage_in_bytes", inactive="total_inactive_file"
)
_V2 = _CgroupFiles(limit="memory.max", usage="memory.current", inactive="inactive_file")


def host_facts(*, proc: Path = Path("/proc/self"), root: Path = Path("/")) -> HostFacts:
    """Return what this process may use of host memory, and what of that is free now.

    Args:
        proc: the process's directory in procfs.
        root: prefix of the mount points that `proc` names; with `proc` it lets tests bring their own file systems.

    """
    machine = psutil.virtual_memory()
    limit_bytes, free_bytes = int(machine.total), int(machine.available)
    for limit, used in _cgroup_levels(proc, root):
        limit_bytes = min(limit_bytes, limit)
        free_bytes = min(free_bytes, max(0, limit - used))
    return HostFacts(limit_bytes=limit_bytes, free_bytes=free_bytes)


def cgroup_version(*, proc: Path = Path("/proc/self"), root: Path = Path("/")) -> int | None:
    """Return 1 or 2, the version of the cgroups that can limit memory here; None where there are none.

    Where both are mounted it is 1: a controller that a hierarchy of v1 has is no part of v2's.
    """
    files = [files for _, _, files in _cgroup_mounts(proc, root)]
    return None if not files else 1 if _V1 in files else 2


def resolve_budget(
    budget: Budget | None, *, device_free_bytes: int, device_total_bytes: int, device_is_host: bool
) -> ResolvedBudget:
    """Resolve a budget (None: the defaults) on this machine; see `Budget.resolve` for arguments and errors."""
    return (budget or Budget()).resolve(
        device_free_bytes=device_free_bytes,
        device_total_bytes=device_total_bytes,
        host=host_facts(),
        inspect_directory=inspect_directory,
        device_is_host=device_is_host,
    )


def _cgroup_levels(proc: Path, root: Path) -> list[tuple[int, int]]:
    """Return (limit, used) bytes of each cgroup above this process that sets a limit."""
    levels = []
    for mount, path, files in _cgroup_mounts(proc, root):
        # In a container the path may be the host's while the mount shows only our part of it: then begin at the mount.
        directory = mount / path if (mount / path).is_dir() else mount
        while True:
            level = _read_level(directory, files)
            if level is not None:
                levels.append(level)
            if directory == mount or mount not in directory.parents:
                break
            directory = directory.parent
    return levels


def _cgroup_mounts(proc: Path, root: Path) -> list[tuple[Path, str, _CgroupFiles]]:
    """Return (mount point, our path below it, files) of the hierarchies that can limit memory."""
    try:
        memberships = (proc / "cgroup").read_text().splitlines()
        mounts = (proc / "mountinfo").read_text().splitlines()
    except OSError:
        return []  # no cgroups here (not Linux, or hidden): only the machine limits
    paths = {}
    for line in memberships:  # hierarchy:controllers:path
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            paths[_V1] = path
        elif not controllers:
            paths[_V2] = path
    found = []
    for (
        line
    ) in mounts:  # id parent major:minor root mount-point options ... - type source super-options
        fields, _, tail = line.partition(" - ")
        kind, _, super_options = tail.split(" ", 2)
        files = _V2 if kind == "cgroup2" else _V1 if "memory" in super_options.split(",") else None
        if files in paths and kind in ("cgroup", "cgroup2"):
            mount_root, mount_point = (unescape(field) for field in fields.split(" ")[3:5])
            found.append((root / mount_point.lstrip("/"), _below(paths[files], mount_root), files))
    return found


def _below(path: str, mount_root: str) -> str:
    """Return our cgroup's path below the mount, which may show only the part of the hierarchy at `mount_root`."""
    if mount_root != "/" and (path == mount_root or path.startswith(mount_root + "/")):
        path = path[len(mount_root) :]
    return path.lstrip("/")


def _read_level(directory: Path, files: _CgroupFiles) -> tuple[int, int] | None:
    try:
        limit = (directory / files.limit).read_text().strip()
        if (
            limit == "max" or int(limit) >= 2**62
        ):  # v1 says "no limit" as the largest multiple of a page
            return None
        used = int((directory / files.usage).read_text())
        stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None  # the root cgroup of v2 has no such files
    return int(limit), max(0, used - int(stat.get(files.inactive, 0)))


def inspect_directory(path: str) -> DirectoryFacts:
    """Return the facts of a spill directory.

    Raises:
        FileNotFoundError: there is nothing at `path`.

    """
    status = os.stat(path)  # noqa: PTH116 -- beside os.statvfs and os.access, which pathlib does not have
    space = os.statvfs(path)
    return DirectoryFacts(
        is_directory=Path(path).is_dir(),
        is_writable=os.access(path, os.W_OK | os.X_OK),
        is_tmpfs=_file_system_type(path) in (_TMPFS_MAGIC, _RAMFS_MAGIC),
        free_bytes=space.f_bavail * space.f_frsize,
        file_system=status.st_dev,
        is_read_only=bool(space.f_flag & os.ST_RDONLY),
    )


def _file_system_type(path: str) -> int:
    """Return statfs's f_type, which os.statvfs leaves out; 0 where there is none.

    O_DIRECT tells nothing: tmpfs accepts it.
    """
    if not sys.platform.startswith("linux"):
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    result = (
        ctypes.c_long * 32
    )()  # struct statfs is 120 bytes on 64-bit Linux and begins with f_type, a long
    if libc.statfs(os.fsencode(path), ctypes.byref(result)) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), path)
    return int(result[0]) & 0xFFFFFFFF


def resident_bytes() -> int:
    """Return this process's resident set now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Return the largest resident set since the start, or since `reset_peak_resident` where that worked."""
    try:
        matched = re.search(
            r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE
        )
    except OSError:
        matched = None
    if matched is not None:
        return int(matched[1]) * 1024
    import resource

    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


def reset_peak_resident() -> bool:
    """Let the peak begin at the present resident set; False where the kernel does not offer it (then it stays)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM, since Linux 4.0
    except OSError:
        return False
    return True
