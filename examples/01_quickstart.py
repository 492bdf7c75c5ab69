"""Train a stack of transformer layers inside 40 MiB of device memory; torch alone is needed.

Without a GPU the device is the CPU: the budget then bounds the bytes of live tensors.
"""

from __future__ import annotations

import torch
from torch import nn

import memopt

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

model = nn.Sequential(
    nn.Embedding(256, 64),
    *(nn.TransformerEncoderLayer(64, 4, 256, batch_first=True) for _ in range(8)),
    nn.Linear(64, 256),
).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

with memopt.optimize(model, optimizer, budget=memopt.Budget(device="40MiB")) as run:
    for _ in range(4):  # the loop is your own, unchanged
        tokens = torch.randint(256, (8, 128), device=device)
        logits = model(tokens)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

print(run.report())
assert run.report().measured.device_bytes <= 40 * 2**20
