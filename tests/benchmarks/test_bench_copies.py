"""Part two of the benchmark of copies, on a fake device: it runs every way and every case, and counts what it says."""

from __future__ import annotations

import importlib
import time
from pathlib import Path

import pytest
import torch

from memopt.activations.chain import Chain
from memopt.activations.cuda import CudaTransfers
from memopt.activations.spill import SpillArea
from memopt.io import ExtentStore
from memopt.io.uring import UringEngine
from memopt.memory.pinned import HostPool
from memopt.memory.streams import Words
from memopt.types.errors import IoEngineUnavailable

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "tests/activations"))
    return importlib.import_module("_device_ssd")


@pytest.fixture
def transfers(bench, monkeypatch, tmp_path):
    fake = importlib.import_module("_fake_cuda")
    try:
        engine = UringEngine.open(queue_depth=8)
    except IoEngineUnavailable as error:
        pytest.skip(str(error))
    with fake.fake_cuda(monkeypatch, fake.FakeDevice(pause_s=0.0)) as device:
        cpu = torch.device("cpu")
        pools = [HostPool(4 * MIB, True, cudart=device) for _ in range(3)]
        store = ExtentStore([(tmp_path, 64 * MIB)], engine)
        transfers = CudaTransfers(cpu, pools[0], None, 1 << 30)
        transfers.spill = SpillArea(store, pools[1])
        words = Words(pools[2], device, num_words=64)
        transfers.chain = Chain(cpu, store, device, words, 4 * MIB)
        yield transfers
        transfers.close()
        engine.close()


def test_every_way_and_case(bench, transfers):
    rounds = bench.Rounds(transfers, [torch.full((MIB,), i, dtype=torch.uint8) for i in range(4)])
    saves = []
    bench.run_rounds([rounds], 2, time.perf_counter() + 120, lambda: saves.append(rounds.rows()))
    rows = {(r["way"], r["case"], r["direction"]): r for r in saves[-1]}
    ways = [(way, case) for way in ("chain", "python", "blocking") for case in bench.CASES]
    assert len(saves) == 2 * len(ways)
    assert rows.keys() == {(*way, direction) for way in ways for direction in ("write", "read")}
    for (way, case, _), row in rows.items():
        assert row["gb_per_s"] > 0
        assert row["num_rounds"] == 1, "the first round is not counted"
        assert (row["own_s"] >= 0.001) == case.startswith("caller")
        assert row["own_s"] + 4 * row["calls_s_per_tensor"] <= row["total_s"] * 1.001
        assert ("locks_lost_per_tensor" in row) == (case == "a thread spins")
        if way == "blocking":
            assert row["ratio_to_blocking"] == 1
    assert transfers.chain is rounds.chain
    transfers.finish()
    assert transfers.spill.store.stats().num_extents == 0
    bench.show_chain(saves[-1], bench.Console(width=140))


def test_nothing_begins_after_the_limit(bench, transfers):
    rounds = bench.Rounds(transfers, [torch.zeros(MIB, dtype=torch.uint8)])
    bench.run_rounds([rounds], 2, time.perf_counter() - 1, lambda: pytest.fail("a pass began"))
    assert rounds.rows() == []
