from __future__ import annotations

import errno

import pytest
import torch

from memopt.io import ExtentStore
from memopt.memory.link import measure_hardware
from memopt.memory.rates import (
    PIECE_BYTES,
    measure_disk,
    measure_link,
    measure_page_locking,
    memcpy_rate,
)

MIB = 1 << 20
CPU = torch.device("cpu")


class SlowTicket:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait(self):
        self.log.append(("waited", self.name))


class FakeStore:
    """Counts what is asked of it; optionally fails."""

    def __init__(self, fail_at=None):
        self.log, self.live, self.fail_at = [], set(), fail_at
        self.under_way = self.most_under_way = 0

    def alloc(self, nbytes):
        extent = object()
        self.live.add(extent)
        self.log.append(("alloc", nbytes))
        return extent

    def _begin(self, kind, buffer):
        num = sum(entry[0] == kind for entry in self.log)
        if (kind, num) == self.fail_at:
            raise OSError(errno.EIO, "broken")
        self.log.append((kind, len(buffer)))
        return SlowTicket(self.log, kind)

    def write(self, extent, buffer):
        assert extent in self.live
        return self._begin("write", buffer)

    def read(self, extent, buffer):
        assert extent in self.live
        return self._begin("read", buffer)

    def free(self, extent):
        self.live.remove(extent)


def kinds(store, kind):
    return [entry[1] for entry in store.log if entry[0] == kind]


@pytest.mark.parametrize(
    ("max_bytes", "pieces"),
    [(MIB, [MIB]), (PIECE_BYTES, [PIECE_BYTES]), (3 * PIECE_BYTES + 5, [PIECE_BYTES] * 3)],
)
def test_the_disk_is_written_and_read_once_within_the_bytes_allowed(max_bytes, pieces):
    store, shares = FakeStore(), []
    rates = measure_disk(store, max_bytes, max_s=60, progress=shares.append)
    assert kinds(store, "write") == kinds(store, "read") == pieces
    assert rates.probed_bytes == sum(pieces) <= max_bytes
    assert not store.live
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_time_ends_the_writing():
    store = FakeStore()
    rates = measure_disk(store, 10 * PIECE_BYTES, max_s=0.0)
    assert len(kinds(store, "write")) == 1
    assert rates.probed_bytes == PIECE_BYTES


@pytest.mark.parametrize("fail_at", [("write", 0), ("write", 2), ("read", 1)])
def test_an_error_surfaces_and_no_extent_stays(fail_at):
    store = FakeStore(fail_at)
    with pytest.raises(OSError, match="broken"):
        measure_disk(store, 4 * PIECE_BYTES, max_s=60)
    assert not store.live


def test_a_real_directory(tmp_path):
    with ExtentStore([(tmp_path, 40 * MIB)], "threads") as store:
        rates = measure_disk(store, 40 * MIB)
        stats = store.stats()
    assert stats.in_use_bytes == 0
    assert stats.written_bytes == stats.read_bytes == rates.probed_bytes <= 40 * MIB
    assert rates.write_bytes_per_s > 1e6
    assert rates.read_bytes_per_s > 1e6


def test_without_cuda_the_link_is_copies_in_memory():
    rates = measure_link(CPU)
    assert rates.d2h_bytes_per_s == rates.h2d_bytes_per_s > 1e8
    assert rates.duplex_bytes_per_s == 0
    assert "host memory" in rates.reason
    assert measure_page_locking(CPU).reason == "nothing is page-locked without CUDA"


def test_a_session_measures_the_same_thing(tmp_path):
    with ExtentStore([(tmp_path, 8 * MIB)], "threads") as store:
        hardware = measure_hardware(CPU, None, store)
    assert hardware.source == "measured"
    assert hardware.ssd_write_bytes_per_s > 0
    assert hardware.d2h_bytes_per_s == pytest.approx(memcpy_rate(), rel=0.9)
