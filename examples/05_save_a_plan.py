"""Plan once, run the same plan later: a Plan is a JSON file that can be read, edited and compared."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

import memopt


def train(plan: str | Path) -> memopt.Session:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.TransformerEncoderLayer(64, 4, 256, batch_first=True) for _ in range(6))
    )
    optimizer = torch.optim.AdamW(model.parameters())
    with memopt.optimize(model, optimizer, budget=memopt.Budget(device="25MiB"), plan=plan) as run:
        for _ in range(3):
            model(torch.randn(4, 128, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return run


first = train("auto")
with tempfile.TemporaryDirectory() as directory:
    file = Path(directory) / "plan.json"
    first.plan.save(file)
    print(f"the plan: {file.stat().st_size:,} bytes of JSON, solved by {first.plan.solver}")
    second = train(file)

assert second.plan.regions == first.plan.regions
print(second.report())
