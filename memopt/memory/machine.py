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
