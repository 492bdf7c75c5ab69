# ruff: noqa: E402 - the environment is set before DeepSpeed is imported
"""A worker of test_zero.py: DeepSpeed's ZeRO engine on a CPU with FRUGAL as its optimizer."""

from __future__ import annotations

import os
import sys
import warnings

rank, world, port, FOLDER, *cases = sys.argv[1:]
os.environ.update(
    DS_ACCELERATOR="cpu", RANK=rank, WORLD_SIZE=world, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1",
    MASTER_PORT=port,
)  # fmt: skip
import deepspeed
import torch
from plain_frugal import Plain
from torch import nn

from memopt.optim import Frugal

deepspeed.init_distributed("gloo")
GAP, LR = 2, 1e-2


def make(stage, selection):
    torch.manual_seed(0)
    layers = [nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3)]
    model = nn.Sequential(*layers)
    matrices = [(n, p) for n, p in model.named_parameters() if p.dim() == 2]
    vectors = [(n, p) for n, p in model.named_parameters() if p.dim() < 2]
    groups = [{"params": matrices}, {"params": vectors, "split": False}]
    optimizer = Frugal(
        groups, lr=LR, selection=selection, density=0.3, update_gap=GAP, weight_decay=0.1
    )
    seen = []

    def before(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            (p,) = group["params"]
            seen.append([group["split"], p.detach().clone(), p.grad.clone(), p])

    optimizer.register_step_pre_hook(before)
    config = {
        "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    seen.clear()
    return engine, optimizer, seen


def train(engine, numbers):
    for number in numbers:
        generator = torch.Generator().manual_seed(2 * number + int(rank))
        loss = engine(torch.randn(4, 8, generator=generator).bfloat16()).float().pow(2).mean()
        engine.backward(loss)
        engine.step()


SETTINGS = {"full": "adamw", "free": "sign", "lr": LR, "wd": 0.1, "free_scale": 1.0,
            "full_scale": 1.0, "betas": (0.9, 0.999), "eps": 1e-8}  # fmt: skip
SHOW = warnings.showwarning
warnings.filterwarnings("always", message=".*chooses whole tensors")  # in each case, not once


def run(stage, selection):
    engine, optimizer, seen = make(stage, selection)
    written = {split: Plain(SETTINGS) for split in (True, False)}
    masks = set()
    warned = []
    warnings.showwarning = lambda message, *more, **most: (
        warned.append(str(message))
        if "chooses whole tensors" in str(message)
        else SHOW(message, *more, **most)
    )
    for step in range(7):
        seen.clear()
        train(engine, [step])
        assert [entry[0] for entry in seen] == [True, False]  # one group at a time
        for split, weight, grad, p in seen:
            assert p.dim() == 1
            if split and step % GAP == 0:
                written[split].reset()
            mask = optimizer.state_full_mask(p)
            expected = written[split].update(weight, grad, mask=mask)
            assert (p.detach() - expected).abs().max() <= 1e-6 * expected.abs().max(), step
            if split:
                masks.add(bytes(mask.to(torch.uint8).tolist()))
                assert int(mask.sum()) == int(0.3 * p.numel())
    groups = [group["params"][0].numel() for group in optimizer.param_groups]
    assert [group["calls"] for group in optimizer.param_groups] == [7, 7]
    rounds = (
        4 if selection == "coordinates" else 1
    )  # blocks of one tensor: its beginning, with a warning
    assert len(masks) == rounds, len(masks)
    assert bool(warned) == (selection == "blocks"), warned
    assert optimizer.state_bytes() == 8 * (int(0.3 * groups[0]) + groups[1])

    folder = f"{FOLDER}/{stage}-{selection}"
    engine.save_checkpoint(folder)
    again, other, _ = make(stage, selection)
    again.load_checkpoint(folder)
    train(engine, range(7, 11))
    train(again, range(7, 11))
    for p, q in zip(engine.module.parameters(), again.module.parameters(), strict=True):
        assert torch.equal(p, q)
    for a, b in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert a["round"] == b["round"] == (5 if a["split"] else a["round"])
        assert torch.equal(a["params"][0], b["params"][0])


for case in cases:
    stage, selection = case.split("-")
    print(case, flush=True)
    run(int(stage), selection)
print("fine", flush=True)
os._exit(0)
