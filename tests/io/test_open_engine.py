from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from memopt.io import open_engine
from memopt.types.errors import IoEngineUnavailable
from tests.io.test_uring import make_engine

REPOSITORY = Path(__file__).resolve().parents[2]


def test_unknown_engine_is_refused():
    with pytest.raises(
        ValueError, match='engine=\'aio\' is unknown; choose "auto", "io_uring" or "threads"'
    ):
        open_engine("aio")


def test_engine_by_name_has_no_reason(tmp_path):
    with open_engine("threads") as engine:
        assert (engine.name, engine.reason) == ("threads", "")
    make_engine().close()
    for name in ("io_uring", "auto"):
        with open_engine(name, directory=tmp_path) as engine:
            assert (engine.name, engine.reason) == ("io_uring", "")


def test_only_auto_falls_back_without_the_native_part(monkeypatch):
    monkeypatch.setitem(sys.modules, "memopt.io._uring", None)
    with pytest.raises(IoEngineUnavailable, match="native part of memopt is missing"):
        open_engine("io_uring")
    with open_engine("auto") as engine:
        assert engine.name == "threads"
        assert "native part of memopt is missing" in engine.reason


def test_a_missing_runtime_of_cffi_is_not_put_down_to_the_build():
    make_engine().close()
    code = (
        "import sys; sys.modules['_cffi_backend'] = None\n"
        "from memopt.io import open_engine\n"
        "with open_engine('auto') as engine: print(engine.name, '|', engine.reason)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name, _, reason = done.stdout.partition(" | ")
    assert name == "threads"
    assert reason.startswith("io_uring: the runtime of cffi is missing")
    assert "gcc" not in reason


def test_a_probe_that_fails_is_a_reason(tmp_path, monkeypatch):
    make_engine().close()
    from memopt.io import uring

    def refuse(*_args):
        raise OSError(5, "Input/output error: write at offset 0")

    monkeypatch.setattr(uring, "prove", refuse)
    with open_engine("auto", directory=tmp_path) as engine:
        assert engine.name == "threads"
        assert "a test block failed" in engine.reason


SECCOMP = """
import ctypes, struct, sys
RET_ERRNO_EPERM, RET_ALLOW = 0x00050001, 0x7fff0000
filters = b"".join(struct.pack("HBBI", *f) for f in [
    (0x20, 0, 0, 0),                # load the number of the system call
    (0x15, 0, 1, 425),              # io_uring_setup?
    (0x06, 0, 0, RET_ERRNO_EPERM),
    (0x06, 0, 0, RET_ALLOW),
])
code = ctypes.create_string_buffer(filters)
program = struct.pack("HxxxxxxP", 4, ctypes.addressof(code))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, program, 0, 0) == 0
from memopt.io import open_engine
from memopt.types.errors import IoEngineUnavailable
try:
    open_engine("io_uring")
except IoEngineUnavailable as error:
    print(error)
with open_engine("auto") as engine:
    print(engine.name, "|", engine.reason)
"""


def test_seccomp_as_in_containers():
    """The filter does what Docker's default profile does: io_uring_setup answers EPERM."""
    make_engine().close()
    done = subprocess.run(
        [sys.executable, "-c", SECCOMP], capture_output=True, text=True, check=True
    )
    first, second = done.stdout.strip().splitlines()
    assert "Operation not permitted" in first
    assert "seccomp" in first
    assert second == f"threads | {first}"


@pytest.mark.parametrize(("required", "fails"), [("1", True), ("0", False), ("", False)])
def test_build_without_a_compiler(tmp_path, required, fails):
    """A build that cannot make the native part goes on without it, unless it was required."""
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        tmp_path / "l",
        "--build-temp",
        tmp_path / "t",
    ]
    environment = {**os.environ, "CC": "false", "MEMOPT_REQUIRE_NATIVE": required}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, check=False
    )
    assert (done.returncode != 0) == fails, done.stderr
    assert list(tmp_path.rglob("*.so")) == []


def test_the_binding_is_made_of_the_header():
    make_engine().close()
    from memopt.io.uring import load_native

    header = (REPOSITORY / "csrc/io/uring_engine.h").read_text()
    for name in (
        "memopt_uring_open",
        "memopt_uring_submit",
        "memopt_uring_wait",
        "memopt_uring_close",
    ):
        assert name in header
        assert hasattr(load_native().lib, name)


@pytest.mark.parametrize(
    ("code", "disabled", "why"),
    [
        (errno.EPERM, "2", "kernel.io_uring_disabled is 2"),
        (errno.EPERM, "1", "kernel.io_uring_disabled is 1"),
        (errno.EPERM, "0", "seccomp"),
        (errno.EPERM, None, "seccomp"),
        (errno.EACCES, "2", "security policy"),
        (errno.ENOSYS, None, "no io_uring"),
        (errno.ENOMEM, "0", "ulimit -l"),
        (errno.EINVAL, "0", "Invalid argument"),
    ],
)
def test_a_refusal_is_put_down_to_what_causes_it(code, disabled, why, tmp_path, monkeypatch):
    """The sysctl answers EPERM (Documentation/admin-guide/sysctl/kernel.rst), as a seccomp profile does."""
    make_engine().close()
    from memopt.io import uring

    class Refusing:
        ffi = uring.load_native().ffi

        class lib:
            @staticmethod
            def memopt_uring_open(*_):
                return -code

    setting = tmp_path / "io_uring_disabled"
    if disabled is not None:
        setting.write_text(f"{disabled}\n")
    monkeypatch.setattr(uring, "_DISABLED", setting)
    monkeypatch.setattr(uring, "load_native", lambda: Refusing)
    monkeypatch.setattr(uring, "ShortCalls", lambda native: None)
    with pytest.raises(IoEngineUnavailable, match=why):
        open_engine("io_uring")
