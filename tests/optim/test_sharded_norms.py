"""Rules that need norms of whole matrices, on two gloo processes with FSDP2: the step of one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = """
import sys, torch, torch.distributed as dist
from unittest import mock
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from memopt.optim import Frugal, bucket, frugal, frugal_groups, stepper
from memopt.optim.presets import apollo, fira, scale, sinkgd
from memopt.optim.tensors import Shards

folder, width = sys.argv[1], int(sys.argv[2])

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)
        self.one = nn.Linear(8, 1)  # a matrix of one row: the second process has nothing of it
    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x))) + self.one(x)

def build():
    torch.manual_seed(0)
    blocks = nn.ModuleList([Block() for _ in range(2)])
    return nn.ModuleList([nn.Embedding(5, 8), blocks, nn.Linear(8, 3)])

def loss(model, number):
    generator = torch.Generator().manual_seed(number)
    x = model[0](torch.randint(5, (6,), generator=generator))
    for block in model[1]:
        x = block(x)
    return (1.0 + number % 3) * model[2](x).square().mean()  # growth, for the limiter

def steps(model, optimizer, numbers, seen=None):
    for number in numbers:
        optimizer.zero_grad()
        loss(model, number).backward()
        with CommDebugMode() as mode:
            optimizer.step()
        if seen is not None:
            seen.append(sum(n for op, n in mode.get_comm_counts().items() if "reduce" in str(op)))

def shard(model):
    for block in model[1]:
        fully_shard(block, mesh=mesh)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return model

def split(model, density):  # rank 1 of a matrix of one row is no subspace
    return frugal_groups(model, density, always_full=["*.one.*"])

METHODS = {
    "fira": lambda m: fira(split(m, 0.6), lr=0.02, update_gap=3),
    "apollo": lambda m: apollo(split(m, 0.6), lr=0.02, update_gap=3),
    "mini": lambda m: apollo(split(m, 0.6), lr=0.02, mini=True, update_gap=3),
    "scale": lambda m: scale(m, lr=0.02),
    "sinkgd": lambda m: sinkgd(frugal_groups(m), lr=0.02),
    "normalized": lambda m: Frugal(
        list(m.named_parameters()), lr=0.02, density=0.0, state_free="column_normalized",
    ),
}
SUMS = {"fira": 4, "apollo": 4, "mini": 4, "scale": 1, "sinkgd": 6 * 5, "normalized": 7}
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
if sys.argv[3] == "hybrid":  # replicas of shards; here one replica
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicas", "shards"))
is_sharded = bucket.shards_of
torch.Tensor.full_tensor = lambda tensor: tensor

for name, make in METHODS.items():
    plain, sharded = build(), shard(build())
    one, two = make(plain), make(sharded)
    with mock.patch.multiple(
        bucket, shards_of=lambda p: is_sharded(p) or (Shards(1, p.shape[0]) if p.dim() > 1 else None)
    ), mock.patch.object(stepper, "total_over_shards", lambda e: None):
        # Shards have the right basis, always: give it to one process, too.
        steps(plain, one, range(8))
    counts = []
    steps(sharded, two, range(8), counts)
    assert counts == [SUMS[name] + 1] + [SUMS[name]] * 7, (name, counts)  # the first: is it a probe?
    for (label, p), q in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            p.full_tensor(), q, rtol=1e-4, atol=4e-6, msg=lambda m: f"{name} {label} {m}"
        )
    dcp.save({"o": get_optimizer_state_dict(sharded, two)}, checkpoint_id=folder + name)
    again = shard(build())
    again.load_state_dict(sharded.state_dict())
    resumed = make(again)
    blank = {"o": get_optimizer_state_dict(again, resumed)}
    dcp.load(blank, checkpoint_id=folder + name)
    set_optimizer_state_dict(again, resumed, blank["o"])
    steps(sharded, two, range(8, 12))
    steps(again, resumed, range(8, 12))
    for p, q in zip(sharded.parameters(), again.parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local()), name
    limits = [v["limiter_norm"] for v in resumed.state.values() if "limiter_norm" in v]
    assert len(limits) == (4 if name in ("fira", "apollo", "mini") else 0)
    assert all(float(limit) > 0 for limit in limits)
dist.destroy_process_group()
print("fine")
"""


@pytest.mark.parametrize(
    ("width", "mesh"),
    [(15, "shards"), pytest.param(16, "hybrid", marks=pytest.mark.slow)],
)
def test_two_processes(width, mesh, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    root = str(Path(__file__).resolve().parents[2])
    base = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1", "PYTHONPATH": root}  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "checkpoint"), str(width), mesh],
            env={**base, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [worker.communicate(timeout=200)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(
        o[-3000:] for o in outputs
    )
    assert all("fine" in output for output in outputs)
