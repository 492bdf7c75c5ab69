from __future__ import annotations

import contextlib
import errno

import pytest
import torch

from memopt.io import ExtentStore
from memopt.memory import rates
from memopt.memory.link import measure_hardware
from memopt.memory.pinned import HostPool
from memopt.memory.rates import (
    PIECE_BYTES,
    link_rates,
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
    found = measure_disk(store, max_bytes, max_s=60, progress=shares.append)
    assert kinds(store, "write") == kinds(store, "read") == pieces
    assert found.probed_bytes == sum(pieces) <= max_bytes
    assert not store.live
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_time_ends_the_writing():
    store = FakeStore()
    found = measure_disk(store, 10 * PIECE_BYTES, max_s=0.0)
    assert len(kinds(store, "write")) == 1
    assert found.probed_bytes == PIECE_BYTES


@pytest.mark.parametrize("fail_at", [("write", 0), ("write", 2), ("read", 1)])
def test_an_error_surfaces_and_no_extent_stays(fail_at):
    store = FakeStore(fail_at)
    with pytest.raises(OSError, match="broken"):
        measure_disk(store, 4 * PIECE_BYTES, max_s=60)
    assert not store.live


def test_a_real_directory(tmp_path):
    with ExtentStore([(tmp_path, 40 * MIB)], "threads") as store:
        found = measure_disk(store, 40 * MIB)
        stats = store.stats()
    assert stats.in_use_bytes == 0
    assert stats.written_bytes == stats.read_bytes == found.probed_bytes <= 40 * MIB
    assert found.write_bytes_per_s > 1e6
    assert found.read_bytes_per_s > 1e6


def test_without_cuda_the_link_is_copies_in_memory():
    found = measure_link(CPU)
    assert found.d2h_bytes_per_s == found.h2d_bytes_per_s > 1e8
    assert found.duplex_bytes_per_s == 0
    assert "host memory" in found.reason
    assert measure_page_locking(CPU).reason == "nothing is page-locked without CUDA"


@pytest.fixture
def one_queue(monkeypatch):
    """CUDA's streams played by the CPU, in order; returns what was called."""
    calls = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    monkeypatch.setattr(
        torch.cuda, "stream", lambda s: calls.append(("stream", s)) or contextlib.nullcontext()
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(("sync", None)))
    return calls


def test_both_ways_at_once_are_two_streams_between_two_synchronisations(one_queue):
    with HostPool(4 * MIB, register=False) as pool:
        out_buffer, in_buffer = pool.take(2 * MIB), pool.take(2 * MIB)
        d2h, h2d = link_rates(CPU, out_buffer, repeats=3)
        assert [kind for kind, _ in one_queue] == ["sync", "sync"] * 6
        one_queue.clear()
        both = rates._duplex_rate(CPU, out_buffer, in_buffer, 1)
        out_buffer.release()
        in_buffer.release()
    assert min(d2h, h2d, both) > 1e7
    assert [kind for kind, _ in one_queue] == ["sync", *["stream"] * 4, "sync"]
    streams = [stream for kind, stream in one_queue if kind == "stream"]
    assert streams[0] is streams[2]
    assert streams[1] is streams[3]
    assert streams[0] is not streams[1]


def test_rates_count_the_bytes_of_both_ways(one_queue, monkeypatch):
    monkeypatch.setattr(rates, "_median_s", lambda device, work, repeats: 0.5)
    with HostPool(4 * MIB, register=False) as pool:
        buffers = pool.take(2 * MIB), pool.take(2 * MIB)
        assert link_rates(CPU, buffers[0]) == (4 * MIB, 4 * MIB)
        # Two copies each way in half a second.
        assert rates._duplex_rate(CPU, *buffers, 1) == 4 * 2 * MIB / 0.5
        for buffer in buffers:
            buffer.release()


def test_a_session_measures_the_same_thing(tmp_path):
    with ExtentStore([(tmp_path, 8 * MIB)], "threads") as store:
        hardware = measure_hardware(CPU, None, store)
    assert hardware.source == "measured"
    assert hardware.ssd_write_bytes_per_s > 0
    assert 0.1 < hardware.d2h_bytes_per_s / memcpy_rate() < 10  # other programs run too
