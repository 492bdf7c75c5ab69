"""How many blocks are in the kernel at a time: the rule, the engines, a session's plan."""

from __future__ import annotations

import contextlib
import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import memopt
from memopt._resources import open_resources
from memopt.io import ExtentStore, create_unlinked, open_engine
from memopt.io.depth import LONGEST_QUEUE, depth_for
from memopt.types.plan import OpPlacement, Plan, RegionPlan
from tests.io.conformance import MIB, pages, soon
from tests.io.test_uring import make_engine

KIB = 1024


@pytest.mark.parametrize(
    ("sizes", "num_directories", "in_flight", "depth"),
    [
        ({}, 1, None, 32),  # not known: large tensors
        ({}, 4, None, 128),
        ({64 * MIB: 12}, 1, 256 * MIB, 32),
        ({64 * MIB: 12}, 2, 256 * MIB, 64),
        ({64 * MIB: 12}, 2, 40 * MIB, 40),  # no more than that is ever on its way
        ({64 * KIB: 1}, 1, 256 * MIB, 128),  # 8 MiB
        ({64 * KIB: 1}, 8, 256 * MIB, LONGEST_QUEUE),
        ({4 * KIB: 9}, 1, 256 * MIB, LONGEST_QUEUE),
        ({0: 5}, 1, 256 * MIB, 32),
        ({64 * MIB: 2, 64 * KIB: 128}, 1, 256 * MIB, 32),  # 256 blocks, of half a MiB on average
        ({64 * KIB: 1}, 1, MIB, 32),  # the floor
    ],
)
def test_the_rule(sizes, num_directories, in_flight, depth):
    found = depth_for(sizes, num_directories=num_directories, in_flight_bytes=in_flight)
    assert found == depth


def test_the_ring_holds_as_many_blocks_as_it_is_told(tmp_path):
    """Nothing finishes while every completion reads "try again", so the peak is the depth."""
    with (
        make_engine(queue_depth=4, max_queue_depth=16) as engine,
        contextlib.closing(create_unlinked(tmp_path)) as file,
    ):
        engine.inject(-errno.EAGAIN, count=2**31)
        ticket = engine.write(file, 0, pages(40 * MIB))
        assert soon(lambda: engine.counters().peak_blocks == 4)
        assert engine.set_queue_depth(9) == 9  # takes effect under way
        assert soon(lambda: engine.counters().peak_blocks == 9)
        assert engine.set_queue_depth(1000) == 16  # what the ring was opened for
        assert soon(lambda: engine.counters().peak_blocks == 16)
        engine.set_queue_depth(2)
        engine.inject()
        ticket.wait(timeout_s=20)
        assert engine.counters().peak_blocks == 16
        with pytest.raises(ValueError, match="queue_depth=0"):
            engine.set_queue_depth(0)
        engine.detach(file)
    with pytest.raises(ValueError, match="closed"):
        engine.set_queue_depth(3)


def test_threads_say_how_many_there_are():
    with open_engine("threads", queue_depth=64) as engine:
        assert engine.queue_depth == engine.set_queue_depth(2) == engine.num_workers == 8


def test_a_store_of_several_directories_opens_a_longer_queue(tmp_path):
    make_engine().close()
    places = [tmp_path / name for name in "abc"]
    for place in places:
        place.mkdir()
    with ExtentStore([(place, MIB) for place in places], "io_uring") as store:
        assert store.engine.queue_depth == 96


def test_a_session_follows_its_plan(tmp_path):
    make_engine().close()
    places = [tmp_path / name for name in "ab"]
    for place in places:
        place.mkdir()
    budget = memopt.Budget(device="1GiB", ssd=[f"{place}:64MiB" for place in places])
    resources = open_resources(torch.nn.Linear(4, 4), None, budget, "io_uring", "auto")

    def depth_of(nbytes: int, placement: str = "ssd") -> int:
        ops = (OpPlacement(position=0, op="aten.mm.default", placement=placement, nbytes=nbytes),)
        plan = Plan(regions=(RegionPlan(name="0", input=placement, ops=ops),))
        region = SimpleNamespace(name="0", input_nbytes=nbytes)
        resources.prepare(plan, SimpleNamespace(regions=[region]))
        return resources.io[0].queue_depth

    try:
        assert resources.io[0].queue_depth == 64  # before there is a plan
        assert depth_of(64 * MIB) == 64
        assert depth_of(96 * KIB) == 172
        assert depth_of(4 * KIB) == LONGEST_QUEUE
        assert depth_of(4 * KIB, "device") == 64
    finally:
        resources.close()


def test_the_pages_figures_are_the_result_files():
    root = Path(__file__).resolve().parents[2]
    rows = json.loads((root / "benchmarks/results/io_depth_cpu_vm_202611.json").read_text())["rows"]
    page = (root / "docs/io.md").read_text()
    for kind, block_bytes in {(row["kind"], row["block_bytes"]) for row in rows}:
        size = f"{block_bytes // KIB} KiB" if block_bytes < MIB else f"{block_bytes // MIB} MiB"
        rates = [
            f"{row['bytes_per_s'] / 1e9:.2f}"
            for row in rows
            if (row["kind"], row["block_bytes"]) == (kind, block_bytes)
        ]
        assert f"| {size}, {kind} | {' | '.join(rates)} |" in page
