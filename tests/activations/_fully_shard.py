"""Two gloo processes train blocks under `fully_shard`, plain and under memopt; run by test_fully_shard.py."""

from __future__ import annotations

import sys
import tempfile

import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import memopt

WIDTH = 64


def build(*, sub_blocks: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [
        nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, batch_first=True, dropout=0.1)
        for _ in range(4)
    ]
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *blocks)
    for block in blocks:
        if sub_blocks:
            fully_shard(block.linear1)
        fully_shard(block)
    return fully_shard(model)


def train(rank: int, **options) -> tuple[list, memopt.Session | None]:
    """Return losses, local gradients and weights of four steps."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(1 + rank)
    seen: list = []

    def loop() -> None:
        for _ in range(4):
            loss = model(torch.randn(4, 64, WIDTH)).square().mean()
            loss.backward()
            seen.append(loss.detach())
            seen.extend(p.grad.to_local().clone() for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        seen.extend(p.detach().to_local().clone() for p in model.parameters())

    if not options:
        loop()
        return seen, None
    with memopt.optimize(model, optimizer, **options) as run:
        loop()
    return seen, run


def refused(model: nn.Module) -> str:
    try:
        with memopt.optimize(model):
            return ""
    except memopt.ConfigError as error:
        return str(error)


def check(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    plain, _ = train(rank)
    cases = {plan: {"plan": plan, "strict": True} for plan in ("recompute", "device")}
    spill = memopt.Budget(device="64MiB", ssd=f"{folder}:64MiB")
    cases["ssd"] = {"plan": "ssd", "budget": spill}
    cases["ranks differ"] = {"plan": ("recompute", "device")[rank]}
    cases["auto"] = {"plan": "auto", "budget": memopt.Budget(device="9MiB")}
    for name, options in cases.items():
        seen, run = train(rank, **options)
        assert len(seen) == len(plain)
        assert all(torch.equal(a, b) for a, b in zip(seen, plain, strict=True)), name
        assert run is not None
        assert len(run.trace.regions) >= 4
        if name == "auto":
            assert any(not r.plain for r in run.plan.regions), "the step fits as it is: no test"
    assert "linear1' inside of it was given to fully_shard" in refused(build(sub_blocks=True))
    mesh = init_device_mesh("cpu", (2,))
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(4)))
    for block in blocks:
        parallelize_module(block[0], mesh, ColwiseParallel())
    assert "tensor parallelism is not supported" in refused(blocks)
    sys.stdout.write(f"rank {rank}: {', '.join(cases)}\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir="/var/tmp") as shared:  # /tmp may be memory
        multiprocessing.spawn(check, (shared,), nprocs=2)
