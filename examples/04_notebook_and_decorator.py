"""The two other ways to use memopt: `start` and `stop` for notebooks, and a decorator."""

from __future__ import annotations

import torch
from torch import nn

import memopt

torch.manual_seed(0)
model = nn.Sequential(*(nn.TransformerEncoderLayer(64, 4, 256, batch_first=True) for _ in range(6)))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
budget = memopt.Budget(device="25MiB")


def step() -> float:
    loss = model(torch.randn(4, 128, 64)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


# In a notebook: one cell starts, later cells train, a last one stops.
run = memopt.start(model, optimizer, budget=budget)
print("notebook:", [round(step(), 4) for _ in range(3)])
run.stop()
print(run.report())


# As a decorator: memopt is active while the function runs.
@memopt.optimize(model, optimizer, budget=budget)
def train(num_steps: int) -> list[float]:
    return [step() for _ in range(num_steps)]


print("decorator:", [round(loss, 4) for loss in train(3)])
