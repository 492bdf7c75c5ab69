"""Builds ``memopt/io/_uring``, the binding of the io_uring engine (cffi in API mode, liburing linked statically).

Used by ``setup.py``. Without liburing's headers the build of memopt goes on without this part, since the threads engine
does the same work; ``MEMOPT_REQUIRE_NATIVE=1`` makes that an error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
REQUIRED = os.environ.get("MEMOPT_REQUIRE_NATIVE", "") not in ("", "0")


def declarations() -> str:
    """Return the header as cffi reads it: without the preprocessor's lines."""
    lines = (HERE / "uring_engine.h").read_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith("#"))


def ask_compiler(*arguments: str, source: str = "") -> subprocess.CompletedProcess[str] | None:
    """Run the compiler that setuptools is about to run; None where there is none."""
    command = [*os.environ.get("CC", "gcc").split(), *arguments]
    if shutil.which(command[0]) is None:
        return None
    return subprocess.run(command, input=source, capture_output=True, text=True, check=False)  # noqa: S603


def what_is_missing() -> str:
    """Return why the engine cannot be built here and what to install; empty where nothing is known to be missing."""
    found = ask_compiler("-E", "-x", "c", "-", source="#include <liburing.h>\n")
    if found is None:
        return "there is no C compiler (Debian: apt-get install gcc libc6-dev liburing-dev)"
    if found.returncode != 0:
        return "the compiler finds no liburing.h (Debian: apt-get install liburing-dev)"
    return ""


def check() -> None:
    """Say what is missing; end the build if the engine was required."""
    reason = what_is_missing()
    if reason and REQUIRED:
        raise SystemExit(f"MEMOPT_REQUIRE_NATIVE is set, but {reason}")
    if reason:
        sys.stderr.write(
            f"memopt is built without its io_uring engine: {reason}; its threads engine does the same work\n"
        )


def liburing_flags() -> list[str]:
    """Prefer the static archive: the machine that runs memopt then needs no liburing of its own."""
    found = ask_compiler("-print-file-name=liburing.a")
    return ["-l:liburing.a"] if found is not None and os.sep in found.stdout else ["-luring"]


def liburing_version() -> str:
    """Return what pkg-config says of the liburing that is compiled in; empty where it cannot say."""
    program = shutil.which("pkg-config")
    if program is None:
        return ""
    asked = [program, "--modversion", "liburing"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)  # noqa: S603 - a fixed question
    return found.stdout.strip()


check()
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
    optional=not REQUIRED,
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
