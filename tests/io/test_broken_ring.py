"""The kernel stops taking a ring's calls while transfers are under way: an error for each ticket, and no hang.

A seccomp filter, put on all threads at once, answers ``io_uring_enter`` with an error.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.io.test_uring import make_engine

PROGRAM = """
import ctypes, struct, sys, time
from memopt.io import ExtentStore, open_engine

def answer_enter_with(code):
    filters = b"".join(struct.pack("HBBI", *f) for f in [
        (0x20, 0, 0, 0),                 # load the number of the system call
        (0x15, 0, 1, 426),               # io_uring_enter?
        (0x06, 0, 0, 0x00050000 | code),
        (0x06, 0, 0, 0x7FFF0000),
    ])
    text = ctypes.create_string_buffer(filters)
    program = struct.pack("HxxxxxxP", 4, ctypes.addressof(text))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.syscall(317, 1, 1, program) == 0, ctypes.get_errno()  # for all threads

directory, code = sys.argv[1], int(sys.argv[2])
engine = open_engine("io_uring", queue_depth=2)
store = ExtentStore([(directory, 64 << 20)], engine)
extents = [store.alloc(8 << 20) for _ in range(8)]
store.write(extents[0], b"x" * (8 << 20)).wait()
engine.inject(-11, count=2**31)  # EAGAIN: nothing ends before the ring breaks
tickets = [store.write(extent, b"y" * (8 << 20)) for extent in extents]
answer_enter_with(code)
start = time.monotonic()
errors = []
for ticket in tickets:
    try:
        ticket.wait(timeout_s=60)
    except OSError as error:
        errors.append((error.errno, error.filename == store.files[0].path))
print(len(errors), *set(errors))
print(round(time.monotonic() - start, 2))
try:
    engine.submit([])
except OSError as error:
    print(error)
try:
    store.read(extents[0], bytearray(1))
except OSError as error:
    print(error.errno)
store.close()
engine.close()
print(time.monotonic() - start < 60, list(engine._in_flight))
"""


def run_broken(directory: Path, code: int) -> list[str]:
    make_engine().close()
    if os.uname().machine != "x86_64":
        pytest.skip("the filter knows the numbers of x86-64's system calls")
    command = [sys.executable, "-c", PROGRAM, str(directory), str(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert list(directory.iterdir()) == []
    return done.stdout.splitlines()


def test_every_ticket_ends_with_the_rings_error(tmp_path):
    """But not at once: the kernel may still fill the memory of a ticket whose blocks it took."""
    failed, seconds, refused, reread, closed = run_broken(tmp_path, errno.EPERM)
    assert failed == "8 (1, True)"
    assert 1.5 < float(seconds) < 30
    assert refused == (
        "[Errno 1] Operation not permitted: io_uring does not take requests any more"
    )
    assert (reread, closed) == ("1", "True []")


@pytest.mark.slow
def test_a_shortage_of_the_kernels_is_waited_out_for_ten_seconds(tmp_path):
    failed, seconds, refused, reread, closed = run_broken(tmp_path, errno.EAGAIN)
    assert failed == "8 (11, True)"
    assert 9 < float(seconds) < 60
    assert "temporarily unavailable" in refused
    assert (reread, closed) == ("11", "True []")
