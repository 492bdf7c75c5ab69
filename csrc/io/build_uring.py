"""Builds ``memopt/io/_uring``, the binding of the io_uring engine (cffi in API mode, liburing linked statically).

Used by ``setup.py``. Without liburing's headers the build of memopt goes on without this part, since the threads engine
does the same work; ``MEMOPT_REQUIRE_NATIVE=1`` makes that an error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent


def declarations() -> str:
    """Return the header as cffi reads it: without the preprocessor's lines."""
    lines = (HERE / "uring_engine.h").read_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith("#"))


def liburing_flags() -> list[str]:
    """Prefer the static archive: the machine that runs memopt then needs no liburing of its own."""
    compiler = os.environ.get("CC", "gcc").split()
    found = subprocess.run(  # noqa: S603 - the compiler that setuptools is about to run as well
        [*compiler, "-print-file-name=liburing.a"], capture_output=True, text=True, check=False
    )
    return ["-l:liburing.a"] if os.sep in found.stdout else ["-luring"]


def liburing_version() -> str:
    """Return what pkg-config says of the liburing that is compiled in; empty where it cannot say."""
    program = shutil.which("pkg-config")
    if program is None:
        return ""
    asked = [program, "--modversion", "liburing"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)  # noqa: S603 - a fixed question
    return found.stdout.strip()


ffibuilder = FFI()
ffibuilder.cdef(declarations())
ffibuilder.set_source(
    "memopt.io._uring",
    '#include "uring_engine.h"',
    sources=[f"csrc/io/uring_{part}.c" for part in ("engine", "driver", "blocks", "registry")],
    include_dirs=["csrc/io"],
    define_macros=[("MEMOPT_LIBURING", f'"{liburing_version()}"')],
    extra_compile_args=["-std=c11", "-O2", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra"],
    extra_link_args=[*liburing_flags(), "-pthread", "-Wl,--exclude-libs,ALL"],
    optional=os.environ.get("MEMOPT_REQUIRE_NATIVE", "") in ("", "0"),
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
