"""The resident set stays near what tensors need: the heap is trimmed when that pays, and only then."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from memopt.memory.accounting import AccountedMemory
from memopt.memory.malloc import SLACK_BYTES, HeapTrimmer

MIB = 1 << 20


class Process:
    """A resident set that frees do not lower until `trim`."""

    def __init__(self, accounted: AccountedMemory, base_bytes: int) -> None:
        self.accounted = accounted
        self.base_bytes = base_bytes
        self.resident_bytes = base_bytes
        self.holes_bytes = 0
        self.trims: list[int] = []

    def resident(self) -> int:
        self.resident_bytes = max(
            self.resident_bytes, self.base_bytes + self.accounted.current_bytes
        )
        return self.resident_bytes

    def trim(self) -> None:
        self.trims.append(self.resident_bytes)
        self.base_bytes -= self.holes_bytes
        self.holes_bytes = 0
        self.resident_bytes = self.base_bytes + self.accounted.current_bytes

    def leave_holes(self, nbytes: int) -> None:
        """Frees of `nbytes` in the heap: resident still, and of no use to the next tensors."""
        self.base_bytes += nbytes
        self.resident()
        self.holes_bytes += nbytes


@pytest.fixture
def watched():
    with AccountedMemory() as accounted:
        process = Process(accounted, 300 * MIB)
        trimmer = HeapTrimmer(accounted, process.trim, process.resident)
        trimmer.start()
        process.trims.clear()
        yield process, trimmer


def tensor(mib: int) -> torch.Tensor:
    return torch.empty(mib * MIB, dtype=torch.uint8)


def test_memory_that_was_needed_before_is_not_given_back(watched):
    process, trimmer = watched
    for _ in range(5):
        held = [tensor(40) for _ in range(4)]
        del held
    assert process.resident_bytes == (300 + 160) * MIB
    assert process.trims == []
    assert trimmer.num_trims == 0


def test_holes_beyond_the_peak_and_the_slack_are_given_back(watched):
    process, trimmer = watched
    held = tensor(100)
    process.leave_holes(SLACK_BYTES)
    small = tensor(16)
    assert process.trims == [], "within the slack"
    process.leave_holes(MIB)
    other = tensor(16)
    assert len(process.trims) == trimmer.num_trims == 1
    assert process.resident_bytes == (300 + 132) * MIB
    del held, small, other


def test_the_slack_grows_with_the_peak(watched):
    process, _ = watched
    held = tensor(2048)
    process.leave_holes(2048 // 16 * MIB)
    more = tensor(8)
    assert process.trims == []
    process.leave_holes(MIB)
    del more
    more = tensor(8)
    assert len(process.trims) == 1
    del held, more


def test_what_no_trim_can_give_back_is_learnt_once(watched):
    """Imports after the start, a staging buffer: else every check would trim."""
    process, trimmer = watched
    process.base_bytes += 200 * MIB
    for _ in range(10):
        held = tensor(32)
        del held
    assert len(process.trims) == 1
    assert trimmer.base_bytes == 500 * MIB


def test_a_buffer_that_stood_at_a_trim_does_not_raise_the_base_for_ever(watched):
    process, trimmer = watched
    process.base_bytes += 400 * MIB  # a file being written, an evaluation's arrays
    held = tensor(32)
    assert trimmer.base_bytes == 700 * MIB
    process.base_bytes -= 400 * MIB
    process.resident_bytes -= 400 * MIB
    del held
    for _ in range(2):
        held = tensor(32)
        del held
    assert trimmer.base_bytes < 400 * MIB
    process.leave_holes(SLACK_BYTES + 32 * MIB)
    process.trims.clear()
    held = tensor(32)
    assert len(process.trims) == 1
    del held


def test_memory_that_is_not_written_to_yet_does_not_lower_the_base(watched):
    process, trimmer = watched
    for _ in range(5):
        process.base_bytes -= 200 * MIB  # `tensor` is counted, the pages are not there
        process.resident_bytes -= 200 * MIB
        held = tensor(200)
        process.base_bytes += 200 * MIB  # now they are
        small = tensor(8)
        del held, small
    assert trimmer.base_bytes >= 300 * MIB
    assert process.trims == []


def test_slow_trims_take_a_twentieth_of_the_time():
    now_s = 0.0

    def trim() -> None:
        nonlocal now_s
        now_s += 2.0

    with AccountedMemory() as accounted:
        resident = iter(range(300 * MIB, 1 << 50, 100 * MIB))  # no trim helps
        trimmer = HeapTrimmer(accounted, trim, lambda: next(resident), lambda: now_s)
        trimmer.start()
        begin_s, num_looks = now_s, 400
        for _ in range(num_looks):
            now_s += 1.0
            tensor(16)
    assert 5 <= trimmer.num_trims <= 0.05 * (now_s - begin_s) / 2.0 + 2


def test_small_tensors_cost_no_look_at_the_process():
    looks = []
    with AccountedMemory() as accounted:
        trimmer = HeapTrimmer(accounted, lambda: None, lambda: looks.append(1) or 0)
        trimmer.start()
        looks.clear()
        kept = [torch.empty(MIB // 16, dtype=torch.uint8) for _ in range(320)]  # 20 MiB in all
        assert 2 <= len(looks) <= 4
        trimmer.stop()
        kept.append(tensor(64))
        assert len(looks) <= 4
        assert accounted.on_sample is None


HOLES = """
import sys, torch
from memopt.memory.accounting import AccountedMemory
from memopt.memory.host import resident_bytes
from memopt.memory.malloc import HeapTrimmer

MIB = 1 << 20
torch.set_num_threads(1)
with AccountedMemory() as accounted:
    for size in (30, 31):  # frees of large blocks teach glibc to take the next ones from the heap
        torch.ones(size * MIB // 4)
    trimmer = HeapTrimmer(accounted)
    if sys.argv[1] == "trimmed":
        trimmer.start()
    before = resident_bytes() - accounted.current_bytes
    most = peak = 0
    kept = []
    for size in range(2, 20):  # holes with something small between them are too small for the next size
        held = []
        for _ in range(140 // size):
            held.append(torch.ones(size * MIB // 4))
            kept.append(torch.ones(4096))
            peak = max(peak, accounted.current_bytes)
            most = max(most, resident_bytes() - before)
    print(most // MIB, peak // MIB, trimmer.num_trims)
"""


def holes(how: str) -> tuple[int, int, int]:
    done = subprocess.run([sys.executable, "-c", HOLES, how], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    most, peak, num_trims = map(int, done.stdout.split())
    return most, peak, num_trims


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_holes_of_a_real_process_are_given_back():
    room = SLACK_BYTES // MIB + 24  # 24: between two looks, and the interpreter's own
    # with torch 2.15 one process in three leaves none: its frees never teach glibc
    left, peak, _ = max(holes("untrimmed") for _ in range(2))
    assert left > peak + room, "the program does leave holes"
    num_all_trims = 0
    for _ in range(4):
        most, peak, num_trims = holes("trimmed")
        assert most <= peak + room
        num_all_trims += num_trims
        if num_all_trims:
            break
    assert num_all_trims >= 1
