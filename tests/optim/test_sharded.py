"""FSDP2 on two gloo processes: the same step as one process, checkpoints that reshard."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memopt.optim import Frugal

WORKER = """
import contextlib, os, sys, torch, torch.distributed as dist
import torch.distributed.checkpoint as dcp
from unittest import mock
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from memopt.optim import Frugal, bucket, frugal, frugal_groups
from memopt.optim.tensors import Shards

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)
    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))

def build(width):
    torch.manual_seed(0)
    blocks = nn.ModuleList([Block(width) for _ in range(3)])
    return nn.Sequential(nn.Linear(4, 8), blocks, nn.Linear(8, 4))

def forward(model, x):
    x = model[0](x)
    for block in model[1]:
        x = block(x)
    return model[2](x)

gathered = []

def steps(model, optimizer, numbers):
    for number in numbers:
        torch.manual_seed(number)
        x = torch.randn(6, 4)
        optimizer.zero_grad()
        forward(model, x).square().mean().backward()
        with CommDebugMode() as seen:
            optimizer.step()
        gathered.append(seen.get_total_counts())

def make(model, selection):
    groups = frugal_groups(model, 0.4, selection=selection, update_gap=3)
    return Frugal(groups, lr=1e-2, weight_decay=0.1)

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
if sys.argv[2] == "hybrid":  # replicas of shards; here one replica
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicas", "shards"))
def shard(model):
    for block in model[1]:
        fully_shard(block, mesh=mesh)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return model

def one_process_has_a_shards_basis(patches):
    # shards have the right basis, always; give it to one process, too
    kept, shown = bucket.shards_of, frugal.as_sharded
    for where, name, value in (
        (bucket, "shards_of", lambda p: kept(p) or (Shards(1, p.shape[0]) if p.dim() > 1 else None)),
        (frugal, "as_sharded", lambda b, i, v: shown(b, i, v) if kept(b.entries[i].param) else v),
    ):
        patches.enter_context(mock.patch.object(where, name, value))
    patches.enter_context(
        mock.patch.object(torch.Tensor, "full_tensor", lambda tensor: tensor, create=True)
    )

def run(selection, width, folder, patches):
    subspace = selection in ("svd", "random")
    if subspace:
        one_process_has_a_shards_basis(patches)
    gathered.clear()
    plain, sharded = build(width), shard(build(width))
    one, two = make(plain, selection), make(sharded, selection)
    steps(plain, one, range(5))
    assert not any(gathered), gathered
    gathered.clear()
    steps(sharded, two, range(5))
    matrices = 6 if selection == "svd" else 0  # their gradients, in the switches 0 and 3
    # and one number in the first step: whether all ranks' gradients are zero, a library's probe
    assert gathered == [matrices + 1, 0, 0, matrices, 0], gathered
    if selection == "columns" or subspace:  # the same draw as without shards: the same weights
        near = {"rtol": 1e-3, "atol": 2e-5} if subspace else {"rtol": 1e-5, "atol": 1e-6}
        for (name, p), q in zip(sharded.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.full_tensor(), q, **near, msg=lambda m: name + m)
    if selection == "blocks":  # every rank chose the same share of the same tensors
        chosen = torch.tensor([
            float(two.state_full_mask(p).float().mean()) for p in two.param_groups[0]["params"]
        ])
        others = [torch.empty_like(chosen) for _ in range(2)]
        dist.all_gather(others, chosen)
        assert width % 2 or torch.equal(others[0], others[1]), others
        assert (others[0] - others[1]).abs().max() <= 1 / 4  # uneven shards: to within a row
        assert width % 2 or ((chosen == 0) | (chosen == 1)).sum() >= len(chosen) - 1

    saved = {"o": get_optimizer_state_dict(sharded, two)}
    dcp.save(saved, checkpoint_id=folder)
    resumed_model = shard(build(width))
    resumed_model.load_state_dict(sharded.state_dict())
    resumed = make(resumed_model, selection)
    blank = {"o": get_optimizer_state_dict(resumed_model, resumed)}
    dcp.load(blank, checkpoint_id=folder)
    set_optimizer_state_dict(resumed_model, resumed, blank["o"])
    steps(sharded, two, range(5, 10))
    steps(resumed_model, resumed, range(5, 10))
    for p, q in zip(sharded.parameters(), resumed_model.parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local())

    if selection == "columns" or subspace:  # and on one process, without shards: resharded
        steps(plain, one, range(5, 10))
        single = build(width)
        third = make(single, selection)
        target = {"o": get_optimizer_state_dict(single, third)}
        dcp.load(target, checkpoint_id=folder)
        set_optimizer_state_dict(single, third, target["o"])
        reference = build(width)
        fresh = make(reference, selection)
        steps(reference, fresh, range(5))
        single.load_state_dict(reference.state_dict())
        steps(single, third, range(5, 10))
        for p, q in zip(single.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)

def run_options(selection, width, folder):
    # All parameters in one group: its last is even, those before are not.
    def make():
        model = shard(build(width))
        return model, Frugal(model.named_parameters(), lr=1e-2, update_gap=3, selection=selection)
    for kind in ("flatten", "full"):
        flat, full = kind == "flatten", kind == "full"
        model, optimizer = make()
        steps(model, optimizer, range(5))
        saving = StateDictOptions(
            flatten_optimizer_state_dict=flat, full_state_dict=full, cpu_offload=full)
        loading = StateDictOptions(
            flatten_optimizer_state_dict=flat, full_state_dict=full, broadcast_from_rank0=full)
        saved = get_optimizer_state_dict(model, optimizer, options=saving)
        other, resumed = make()
        other.load_state_dict(model.state_dict())
        set_optimizer_state_dict(other, resumed, saved, options=loading)
        steps(model, optimizer, range(5, 10))
        steps(other, resumed, range(5, 10))
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p.to_local(), q.to_local()), kind

def run_zeros(selection, width, folder):
    # The first gradient is zero in the rows of the last rank only: no library's probe.
    model = shard(build(width))
    optimizer = make(model, selection)
    for number in range(5):
        torch.manual_seed(number)
        for p in model.parameters():
            whole = torch.randn(p.shape)
            if number == 0:
                whole[-(-p.shape[0] // 2):] = 0
            p.grad = distribute_tensor(whole, mesh, p.placements)
        optimizer.step()
    assert [group["calls"] for group in optimizer.param_groups] == [5, 5]

for text in sys.argv[3:]:
    if "/" in text:
        kind, text = text.split("/")
        print(kind, text, flush=True)
        selection, width = text.split("-")
        {"options": run_options, "zeros": run_zeros}[kind](selection, int(width), sys.argv[1])
        continue
    selection, width = text.split("-")
    print(text, flush=True)
    with contextlib.ExitStack() as patches:
        run(selection, int(width), f"{sys.argv[1]}/{text}", patches)
dist.barrier()
dist.destroy_process_group()
print("fine", flush=True)
os._exit(0)  # gloo's threads end some interpreters by an abort
"""


CASES = [
    f"{selection}-{width}"
    for selection in ("columns", "rows", "blocks", "coordinates", "svd", "random")
    for width in (16, 15)  # 15: the last shard is smaller
]
CASES += [f"options/{name}-15" for name in ("columns", "rows", "blocks", "svd")]
CASES += ["zeros/columns-16", "zeros/svd-16"]


@pytest.mark.parametrize("mesh", ["shards", pytest.param("hybrid", marks=pytest.mark.slow)])
def test_two_processes(mesh, tmp_path):
    """All cases in one pair of processes: what a case takes is their start."""
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
            [sys.executable, str(script), str(tmp_path), mesh, *CASES],
            env={**base, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [worker.communicate(timeout=200)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(
        o[-3000:] for o in outputs
    )
    assert all("fine" in output for output in outputs)


def state_after(selection, **settings):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 6))
    optimizer = Frugal([weight], selection=selection, density=0.5, **settings)
    weight.grad = torch.randn(8, 6)
    optimizer.step()
    return weight, optimizer


@pytest.mark.parametrize("selection", ["blocks", "rows", "coordinates"])
def test_slices_of_another_number_of_shards_are_refused(selection):
    _, optimizer = state_after(selection)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["num_shards"] == 1
    saved["param_groups"][0]["num_shards"] = 2
    with pytest.raises(ValueError, match="saved on 2 shards and is loaded on 1"):
        Frugal([torch.nn.Parameter(torch.zeros(8, 6))], selection=selection).load_state_dict(saved)


def test_rows_of_state_can_be_resharded_but_not_as_8bit_codes():
    for settings in ({}, {"quantize": "8bit"}):
        _, optimizer = state_after("columns", **settings)
        saved = optimizer.state_dict()
        saved["param_groups"][0]["num_shards"] = 2
        other = Frugal([torch.nn.Parameter(torch.zeros(8, 6))], selection="columns", **settings)
        if settings:
            with pytest.raises(ValueError, match="quantize='8bit'"):
                other.load_state_dict(saved)
        else:
            other.load_state_dict(saved)
            assert other.param_groups[0]["num_shards"] == 1


def test_state_of_a_lower_density_than_the_arenas_is_not_resharded():
    _, optimizer = state_after("columns", arena_density=1.0)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["num_shards"] = 2
    other = Frugal([torch.nn.Parameter(torch.zeros(8, 6))], selection="columns", arena_density=1.0)
    with pytest.raises(ValueError, match="saved on 2 shards"):
        other.load_state_dict(saved)
