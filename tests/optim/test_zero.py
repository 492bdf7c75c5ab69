"""DeepSpeed's own ZeRO engine: flat 1-D partitions, one group stepped at a time."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CASES = ("1-blocks", "2-coordinates", "2-blocks")  # the stage of ZeRO and the selection


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
def test_update_by_update_and_resumed(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    workers = [
        subprocess.Popen(
            [sys.executable, str(HERE / "_zero.py"), str(rank), "2", port, str(tmp_path), *CASES],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert all("fine" in output for output in outputs), "\n".join(o[-3000:] for o in outputs)
