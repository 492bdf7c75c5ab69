"""Facts of the machine that need neither torch nor CUDA."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def num_usable_cpus() -> int:
    """Return how many CPUs this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not Linux
        return os.cpu_count() or 1


def num_idle_cpus(root: Path = Path("/")) -> float:
    """Return how many of this process's CPUs others leave idle: its share less the load of the last minute.

    The share is the least of its CPUs and its cgroup's quota (in a container those are not one). At
    least 0.

    Args:
        root: prefix of the cgroup file systems; tests bring their own.
    """
    share = min(float(num_usable_cpus()), _cpu_quota(root / "sys/fs/cgroup"))
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # not Unix
        load = 0.0
    return max(0.0, share - load)


def _cpu_quota(cgroup: Path) -> float:
    """CPUs' worth of time that the container's cgroup may use: cgroup v2's file, v1's, or no limit."""
    try:
        if (cgroup / "cpu.max").exists():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else float("inf")
    except (OSError, ValueError):  # hidden, absent, or "max"
        return float("inf")


def driver_version(proc: Path = Path("/proc")) -> str:
    """Return the NVIDIA driver's version, or an empty string where the kernel does not show it."""
    try:
        text = (proc / "driver/nvidia/version").read_text()
    except OSError:
        return ""
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)*)\b", text)
    return found[1] if found else ""


def cpu_name(proc: Path = Path("/proc")) -> str:
    """Return the processor's name, or the architecture's."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", (proc / "cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()
