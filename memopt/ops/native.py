"""Finding and loading `libmemopt_cuda.so`, on first use.

The library is built by `tools/build_cuda.py`. It is searched at $MEMOPT_CUDA_LIBRARY, beside this
file, and in `.native/` of a source checkout. It links to torch's stable ABI only, so one build
serves torch 2.11 and later, and it loads on a CPU torch too (for schema tests).
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from memopt.types.errors import NativeUnavailable

LIBRARY = "libmemopt_cuda.so"
OPERATORS = ("frugal_step", "frugal_draw", "frugal_clock")


@dataclass(frozen=True, kw_only=True)
class CudaStatus:
    """Whether the native kernels can run here; `reason` says why not (empty when they can)."""

    available: bool
    loaded: bool
    path: str
    build: str
    reason: str


def library_candidates() -> list[Path]:
    """Return where the library is looked for, first match wins."""
    named = os.environ.get("MEMOPT_CUDA_LIBRARY")
    here = Path(__file__).resolve()
    places = [here.parent / LIBRARY, here.parents[2] / ".native" / LIBRARY]
    return [Path(named)] if named else places


@lru_cache(maxsize=1)
def _load() -> tuple[str, str, str]:
    """Load once; return (path, build info, reason for failure)."""
    places = library_candidates()
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        looked = ", ".join(str(place) for place in places)
        return "", "", f"not built: {LIBRARY} not found at {looked}; run tools/build_cuda.py"
    try:
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
        library.memopt_cuda_build_info.restype = ctypes.c_char_p
        build = library.memopt_cuda_build_info().decode()
    except (OSError, RuntimeError, AttributeError) as error:
        version = torch.__version__
        return str(path), "", f"{path} does not load under torch {version}: {error}"
    if lacking := [name for name in OPERATORS if not has_operator(name)]:
        old = f"{path} was built from other sources, it lacks {', '.join(lacking)}"
        return str(path), build, f"{old}: run tools/build_cuda.py"
    return str(path), build, ""


def has_operator(name: str) -> bool:
    """Whether torch knows an operator of memopt's by this name."""
    return hasattr(torch.ops.memopt, name)


def cuda_status() -> CudaStatus:
    """Load the native library if that has not been tried, and say what came of it."""
    path, build, reason = _load()
    loaded = not reason
    if loaded and not torch.cuda.is_available():
        reason = "the library is loaded, but torch sees no CUDA device"
    return CudaStatus(
        available=loaded and not reason, loaded=loaded, path=path, build=build, reason=reason
    )


def require_library() -> None:
    """Load the library or raise `NativeUnavailable` with the reason."""
    _, _, reason = _load()
    if reason:
        raise NativeUnavailable(reason)
