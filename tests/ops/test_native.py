"""The native library as far as a machine without a GPU can see it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memopt.ops import cuda_status, frugal_draw, frugal_step, native
from memopt.types.errors import NativeUnavailable

ROOT = Path(__file__).resolve().parents[2]
status = cuda_status()
needs_library = pytest.mark.skipif(
    not status.loaded and os.environ.get("MEMOPT_REQUIRE_CUDA") != "1", reason=status.reason
)


def test_status_says_why():
    assert status.available or status.reason
    if not torch.cuda.is_available():
        assert not status.available


def test_a_missing_library_names_the_remedy():
    code = (
        "from memopt.ops import cuda_status; from memopt.ops.native import require_library\n"
        "print(cuda_status().reason)\n"
        "try: require_library()\n"
        "except Exception as e: print(type(e).__name__)\n"
        "import torch; from memopt.ops import frugal_step as op; op.register()\n"
        "print(torch.ops.memopt.frugal_step.default._schema)\n"
    )
    env = {**os.environ, "MEMOPT_CUDA_LIBRARY": "/nowhere/lib.so"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env, cwd=ROOT
    )
    assert "tools/build_cuda.py" in done.stdout
    assert NativeUnavailable.__name__ in done.stdout
    assert frugal_step.SCHEMA in done.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_library_of_other_sources_is_not_used(tmp_path):
    source, library = tmp_path / "old.cpp", tmp_path / "old.so"
    source.write_text('extern "C" const char* memopt_cuda_build_info() { return "old"; }')
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    code = (
        "from memopt.ops import cuda_status, frugal_step as op; print(cuda_status().reason)\n"
        "import torch; op.register(); print(torch.ops.memopt.frugal_draw.default._schema)\n"
    )
    env = {**os.environ, "MEMOPT_CUDA_LIBRARY": str(library)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env, cwd=ROOT
    )
    assert "lacks frugal_step, frugal_draw, frugal_clock: run tools/build_cuda.py" in done.stdout
    assert frugal_draw.SCHEMA in done.stdout


@needs_library
def test_schemas_of_library_and_python_agree():
    native.require_library()
    assert str(torch.ops.memopt.frugal_step.default._schema) == "memopt::" + frugal_step.SCHEMA
    assert (
        str(torch.ops.memopt.frugal_clock.default._schema) == "memopt::" + frugal_step.CLOCK_SCHEMA
    )
    assert str(torch.ops.memopt.frugal_draw.default._schema) == "memopt::" + frugal_draw.SCHEMA


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_library_needs_only_the_stable_abi_cuda_and_libc():
    done = subprocess.run(
        ["nm", "-D", "--undefined-only", status.path], capture_output=True, text=True, check=True
    )
    names = [line.split()[-1] for line in done.stdout.splitlines()]
    versioned = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_")
    allowed = ("aoti_torch_", "torch_", "cuda", "__cuda", "_ITM_", "__gmon_start__")
    strangers = [n for n in names if not versioned.search(n) and not n.startswith(allowed)]
    assert strangers == []
    weak = [
        line for line in done.stdout.splitlines() if "aoti_torch_get_current_cuda_stream" in line
    ]
    assert weak
    assert all(" w " in line for line in weak)  # else a CPU build of torch could not load it


@needs_library
def test_library_exports_its_launchers_only():
    done = subprocess.run(
        ["nm", "-D", "--defined-only", status.path], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1] for line in done.stdout.splitlines() if " T " in line}
    assert {name for name in names if name.startswith("memopt")} >= {"memopt_cuda_build_info"}


def test_constants_agree_with_the_header():
    header = (ROOT / "csrc/cuda/launchers.h").read_text()
    defined = dict(re.findall(r"#define (MEMOPT_\w+) (\d+)", header))
    assert int(defined["MEMOPT_FRUGAL_MAX_TENSORS"]) == frugal_step.MAX_TENSORS
    assert int(defined["MEMOPT_FRUGAL_CHUNK"]) == frugal_step.CHUNK
    assert int(defined["MEMOPT_FRUGAL_FIELDS"]) == frugal_step.FIELDS
    for kind in frugal_step.Kind:
        assert re.search(rf"MEMOPT_SEGMENT_{kind.name} = {kind.value}\b", header)
    for lines in frugal_draw.Lines:
        assert frugal_step.Kind[lines.name] == lines
    for field in frugal_step.Field:
        assert re.search(rf"MEMOPT_FIELD_{field.name} = {field.value}\b", header)
