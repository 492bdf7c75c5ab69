"""Waits of a CUDA device's compute stream for transfers: all are added up, and no list of them grows with the run."""

from __future__ import annotations

import pytest
import torch
from _fake_cuda import FakeDevice, fake_cuda

from memopt.activations.cuda import _MOST_WAITS, CudaTransfers
from memopt.memory.pinned import HostPool

MIB = 1 << 20


class NotYet:
    """A copy that is on its way while it is asked for; the fake stream does not wait for it."""

    mark = None

    def query(self) -> bool:
        return False


@pytest.fixture
def transfers(monkeypatch):
    with fake_cuda(monkeypatch, FakeDevice(pause_s=0.0)) as device:
        pool = HostPool(MIB, True, cudart=device)
        transfers = CudaTransfers(torch.device("cpu"), pool, None, 1 << 30)
        transfers.device_under_test = device
        yield transfers
        transfers.close()


def run_regions(transfers, *, num_regions: int, waits_each: int) -> None:
    """What backward does: every region polls once and waits for each of its tensors."""
    for _ in range(num_regions):
        transfers.poll()
        for _ in range(waits_each):
            transfers.wait_timed(NotYet(), "fetch")
        transfers.device_under_test.compute.synchronize()


def test_regions_of_many_tensors_leave_no_list_that_grows(transfers):
    run_regions(transfers, num_regions=60, waits_each=100)
    assert len(transfers._waits) <= _MOST_WAITS + 100


def test_the_report_counts_waits_that_no_poll_has_added_up(transfers):
    run_regions(transfers, num_regions=2, waits_each=100)
    pending = list(transfers._waits)
    assert len(pending) > 150, "a poll adds up a few"
    before_s = transfers.moved.exposed_s
    pending_s = sum(begin.elapsed_time(end) for begin, end, _ in pending) / 1e3
    assert pending_s > 0.0
    assert transfers.exposed_s() == pytest.approx(before_s + pending_s, rel=1e-9)
    assert not transfers._waits
    assert sum(transfers.exposed_by.values()) == pytest.approx(transfers.exposed_s())
