"""Checks of software: versions, packages, the native CUDA library, malloc."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from collections.abc import Sequence

from memopt.cli.checks.base import Check, Context, Status

MIN_PYTHON = (3, 10)
MIN_TORCH = (2, 11)
REQUIRED = ("numpy", "psutil", "pulp", "cffi", "click", "rich")
OPTIONAL = ("highspy", "transformers", "accelerate", "deepspeed", "peft", "matplotlib")


def versions(context: Context) -> Sequence[Check]:
    """Python, memopt, torch, CUDA, driver, liburing."""
    import memopt
    from memopt.memory.machine import driver_version

    figures: dict[str, str | None] = {
        "memopt": memopt.__version__,
        "python": platform.python_version(),
        "torch": None,
        "cuda_runtime": None,
        "driver": driver_version(context.root / "proc") or None,
        "cudnn": None,
        "liburing": _liburing_version(),
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()).strip() or None,
    }
    try:
        import torch
    except Exception as error:  # noqa: BLE001 - a torch that does not load raises anything
        found = f"torch does not load: {error}"
        todo = "install torch >= 2.11 (https://pytorch.org/get-started/locally)"
        return [Check(name="versions", status="broken", found=found, todo=todo, figures=figures)]
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    figures |= {
        "torch": torch.__version__,
        "cuda_runtime": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
    }
    shown = ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in figures.items() if value
    )
    todo = _too_old(sys.version_info[:2], torch.__version__)
    return [
        Check(
            name="versions",
            status="broken" if todo else "ok",
            found=shown,
            todo=todo,
            figures=figures,
        )
    ]


def _too_old(python: tuple[int, ...], torch_version: str) -> str:
    """Return what to upgrade; an empty string where everything is new enough."""
    found = re.match(r"(\d+)\.(\d+)", torch_version)
    if python < MIN_PYTHON:
        return f"memopt needs Python {MIN_PYTHON[0]}.{MIN_PYTHON[1]} or later"
    if found and (int(found[1]), int(found[2])) < MIN_TORCH:
        return f"memopt needs torch {MIN_TORCH[0]}.{MIN_TORCH[1]} or later"
    return ""


def _liburing_version() -> str | None:
    """Return the version of liburing inside the native part; None where that is not built or does not tell."""
    from memopt.io.uring import load_native
    from memopt.types.errors import IoEngineUnavailable

    try:
        native = load_native()
        return str(native.ffi.string(native.lib.memopt_uring_liburing()).decode()) or None
    except (IoEngineUnavailable, AttributeError):
        return None


def packages(context: Context) -> Sequence[Check]:
    """Packages that memopt stands on, and those it works with where they are installed."""
    del context
    figures = {name: _version_of(name) for name in (*REQUIRED, *OPTIONAL)}
    missing = [name for name in REQUIRED if figures[name] is None]
    shown = ", ".join(f"{name} {figures[name]}" for name in ("numpy", *OPTIONAL) if figures[name])
    absent = [name for name in OPTIONAL if figures[name] is None]
    if absent:
        shown += f"; not installed: {', '.join(absent)}"
    todo = f"pip install {' '.join(missing)}" if missing else ""
    if missing:
        shown = f"missing: {', '.join(missing)}; {shown}"
    status: Status = "broken" if missing else "ok"
    return [Check(name="packages", status=status, found=shown, todo=todo, figures=figures)]


def _version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def kernels(context: Context) -> Sequence[Check]:
    """The native CUDA library, or why PyTorch's kernels do its work."""
    from memopt.ops.native import cuda_status

    status = cuda_status()
    figures = {
        "available": status.available,
        "loaded": status.loaded,
        "path": status.path,
        "build": status.build,
    }
    if status.available:
        found = f"{status.path} ({status.build})"
        return [Check(name="CUDA kernels", status="ok", found=found, figures=figures)]
    if not context.gpus:
        found = f"not needed without a CUDA device ({status.reason})"
        return [Check(name="CUDA kernels", status="absent", found=found, figures=figures)]
    return [
        Check(
            name="CUDA kernels",
            status="weak",
            found=f"PyTorch's own kernels do the work: {status.reason}",
            todo="build them with nvcc: python tools/build_cuda.py in a checkout",
            figures=figures,
        )
    ]


def malloc(context: Context) -> Sequence[Check]:
    """Whether freed CPU tensors really leave the process."""
    name, version = platform.libc_ver()
    maps = context.read("proc/self/maps") or ""
    found = re.search(r"lib(jemalloc|tcmalloc\w*|mimalloc)[^/\s]*\.so", maps)
    replaced = found[1] if found else None
    figures = {"libc": name, "version": version, "replaced_by": replaced}
    if name == "glibc" and replaced is None:
        text = (
            f"glibc {version}; a session without CUDA gives its free heap memory back (malloc_trim)"
        )
        return [Check(name="malloc", status="ok", found=text, figures=figures)]
    who = replaced or name or "unknown"
    status: Status = "absent" if context.gpus else "weak"
    return [
        Check(
            name="malloc",
            status=status,
            found=f"{who}: freed CPU tensors may stay in the resident set; the device's memory is not touched by it",
            todo=""
            if context.gpus
            else "where the resident set counts (a cgroup limit), run with glibc's malloc (no LD_PRELOAD)",
            figures=figures,
        )
    ]
