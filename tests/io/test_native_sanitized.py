"""The C engine under the sanitizers of gcc: races, bad memory, undefined behaviour."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[2] / "csrc/io"


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_stress(tmp_path, sanitizer):
    program = tmp_path / "stress"
    parts = [
        SOURCES / f"uring_{part}.c" for part in ("engine", "driver", "blocks", "registry", "stress")
    ]
    command = [
        "gcc",
        "-std=c11",
        "-g",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-pthread",
        f"-fsanitize={sanitizer}",
    ]
    command += ["-fno-sanitize-recover=all", *map(str, parts), "-o", str(program), "-luring"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "uring.h" in built.stderr or "cannot find" in built.stderr:
        pytest.skip(built.stderr.splitlines()[0])
    assert built.returncode == 0, built.stderr
    # The kernel's writes into the rings are no accesses that a sanitizer sees, so only the engine's own are judged.
    for sqpoll in ("0", "1"):
        arguments = [program, tmp_path / "file", "100", sqpoll]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if done.returncode == 77:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
