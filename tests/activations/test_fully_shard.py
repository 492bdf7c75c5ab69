"""Blocks under FSDP2's `fully_shard`: two processes, every placement, plans that differ between them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).parent / "_fully_shard.py"


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed part")
def test_two_ranks_train_the_same_bits_and_nested_shards_are_refused():
    done = subprocess.run(
        [sys.executable, PROGRAM],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        assert f"rank {rank}: recompute, device, ssd, ranks differ, auto" in done.stdout
