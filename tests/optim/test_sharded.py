"""FSDP2 on two gloo processes: the same step as one process, checkpoints that reshard."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = """
import os, sys, torch, torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from memopt.optim import Frugal, frugal_groups

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ModuleList([Block() for _ in range(3)]), nn.Linear(8, 4))

def forward(model, x):
    x = model[0](x)
    for block in model[1]:
        x = block(x)
    return model[2](x)

def steps(model, optimizer, numbers):
    for number in numbers:
        torch.manual_seed(number)
        x = torch.randn(6, 4)
        optimizer.zero_grad()
        forward(model, x).square().mean().backward()
        optimizer.step()

def make(model, selection):
    groups = frugal_groups(model, 0.4, selection=selection, update_gap=3)
    return Frugal(groups, lr=1e-2, weight_decay=0.1)

selection, folder = sys.argv[1:3]
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
def shard(model):
    for block in model[1]:
        fully_shard(block, mesh=mesh)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return model

plain, sharded = build(), shard(build())
one, two = make(plain, selection), make(sharded, selection)
steps(plain, one, range(5))
steps(sharded, two, range(5))
if selection == "columns":  # the same draw as without shards: the same weights
    for (name, p), q in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-5, atol=1e-6, msg=name)
if selection == "blocks":  # every rank chose the same share of the same tensors
    chosen = torch.tensor([
        float(two.state_full_mask(p).float().mean()) for p in two.param_groups[0]["params"]
    ])
    others = [torch.empty_like(chosen) for _ in range(2)]
    dist.all_gather(others, chosen)
    assert torch.equal(others[0], others[1]), others
    assert ((chosen == 0) | (chosen == 1)).sum() >= len(chosen) - 1

saved = {"o": get_optimizer_state_dict(sharded, two)}
dcp.save(saved, checkpoint_id=folder)
resumed_model = shard(build())
resumed_model.load_state_dict(sharded.state_dict())
resumed = make(resumed_model, selection)
blank = {"o": get_optimizer_state_dict(resumed_model, resumed)}
dcp.load(blank, checkpoint_id=folder)
set_optimizer_state_dict(resumed_model, resumed, blank["o"])
steps(sharded, two, range(5, 10))
steps(resumed_model, resumed, range(5, 10))
for p, q in zip(sharded.parameters(), resumed_model.parameters(), strict=True):
    assert torch.equal(p.to_local(), q.to_local())

if selection == "columns":  # and on one process, without shards: resharded
    steps(plain, one, range(5, 10))
    single = build()
    third = make(single, selection)
    target = {"o": get_optimizer_state_dict(single, third)}
    dcp.load(target, checkpoint_id=folder)
    set_optimizer_state_dict(single, third, target["o"])
    reference = build()
    fresh = make(reference, selection)
    steps(reference, fresh, range(5))
    single.load_state_dict(reference.state_dict())
    steps(single, third, range(5, 10))
    for p, q in zip(single.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
dist.destroy_process_group()
print("fine")
"""


@pytest.mark.parametrize("selection", ["columns", "blocks", "rows", "coordinates"])
def test_two_processes(selection, tmp_path):
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
            [sys.executable, str(script), selection, str(tmp_path / "checkpoint")],
            env={**base, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [worker.communicate(timeout=200)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(
        o[-3000:] for o in outputs
    )
    assert all("fine" in output for output in outputs)
