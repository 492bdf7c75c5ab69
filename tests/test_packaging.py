"""What somebody else builds: a source distribution, a wheel of it, and a wheel on a machine without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = (
    "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
)


def build(kind: str, source: Path, out: Path, **environment: str):
    return subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(out)],
        cwd=source,
        env={**os.environ, "MEMOPT_REQUIRE_NATIVE": "", **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture
def source(unpacked, tmp_path):
    """A copy to build in: setuptools would take up what an earlier build left."""
    return shutil.copytree(unpacked, tmp_path / "source")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The source distribution, made from a copy of the checkout and unpacked elsewhere."""
    home = tmp_path_factory.mktemp("packaging")
    checkout = home / "checkout"
    unwanted = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "memopt", "tests", "tools"):
        shutil.copytree(ROOT / name, checkout / name, ignore=unwanted)
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, checkout)
    done = build("build_sdist", checkout, home)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(home.glob("*.tar.gz"))) as archive:
        archive.extractall(home / "unpacked")
    return next((home / "unpacked").iterdir())


def wheel_names(directory: Path) -> list[str]:
    with zipfile.ZipFile(next(directory.glob("*.whl"))) as wheel:
        return wheel.namelist()


def test_the_source_distribution_holds_what_its_build_needs(unpacked):
    for path in (ROOT / "csrc").rglob("*.*"):
        if "__pycache__" not in path.parts:
            assert (unpacked / path.relative_to(ROOT)).is_file(), path
    assert (unpacked / "tools/build_cuda.py").is_file()
    assert (unpacked / "memopt/py.typed").is_file()
    assert not (unpacked / "tests").exists()


def test_a_wheel_of_it_has_the_native_engine_and_no_tests(source, tmp_path):
    done = build("build_wheel", source, tmp_path, MEMOPT_REQUIRE_NATIVE="1")
    if done.returncode and os.environ.get("MEMOPT_REQUIRE_NATIVE", "") in ("", "0"):
        pytest.skip(f"no liburing here: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    names = wheel_names(tmp_path)
    assert [name for name in names if name.endswith(".so")] == ["memopt/io/_uring.abi3.so"]
    assert "memopt/py.typed" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"memopt"}


WITHOUT = [
    ({"PATH": os.devnull}, "there is no C compiler", "apt-get install gcc"),
    ({"CC": "gcc -nostdinc"}, "the compiler finds no liburing.h", "apt-get install liburing-dev"),
]


@pytest.mark.parametrize(("environment", "reason", "remedy"), WITHOUT)
def test_what_is_missing_is_said_and_the_build_goes_on(
    source, tmp_path, environment, reason, remedy
):
    done = build("build_wheel", source, tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert f"without its io_uring engine: {reason}" in done.stderr
    assert remedy in done.stderr
    assert not [name for name in wheel_names(tmp_path) if name.endswith(".so")]


@pytest.mark.parametrize(("environment", "reason", "remedy"), WITHOUT)
def test_what_is_missing_ends_a_build_that_requires_it(
    source, tmp_path, environment, reason, remedy
):
    done = build("build_wheel", source, tmp_path, MEMOPT_REQUIRE_NATIVE="1", **environment)
    assert done.returncode != 0
    assert f"MEMOPT_REQUIRE_NATIVE is set, but {reason}" in done.stderr
    assert remedy in done.stderr
    assert "Traceback" not in done.stderr
