"""Send every activation to a directory, and see that loss and gradients keep their bits.

`plan="ssd"` forces one placement everywhere. Leave it out (`plan="auto"`), and memopt spills only what pays.
`strict=True` checksums every byte on its way out and back.
"""

from __future__ import annotations

import copy
import tempfile

import torch
from torch import nn

import memopt

torch.manual_seed(0)
plain = nn.Sequential(
    *(nn.TransformerEncoderLayer(64, 4, 256, 0.0, batch_first=True) for _ in range(6))
)
model = copy.deepcopy(plain)
x = torch.randn(4, 128, 64)

plain(x).square().mean().backward()

with tempfile.TemporaryDirectory() as directory:
    budget = memopt.Budget(ssd=f"{directory}:1GiB")
    with memopt.optimize(model, budget=budget, plan="ssd", strict=True) as run:
        for _ in range(2):
            model.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
    report = run.report()

print(report)
for expected, parameter in zip(plain.parameters(), model.parameters(), strict=True):
    assert torch.equal(expected.grad, parameter.grad)
print(f"written {report.moved.ssd_write_bytes:,} bytes, read {report.moved.ssd_read_bytes:,} bytes")
assert report.moved.ssd_write_bytes > 0
