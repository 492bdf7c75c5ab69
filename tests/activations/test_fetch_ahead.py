"""What backward asks for next is on its way in time: whole regions, also where regions share an argument."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.activations.engine import ActivationEngine
from memopt.activations.shared_inputs import SharedInput
from memopt.activations.stored import DeviceStored
from memopt.types.plan import OpPlacement, Plan, RegionPlan

WIDTH = 128
ROWS = 512
TENSOR_BYTES = ROWS * WIDTH * 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return x + torch.mm(x, self.weight).tanh() * table


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        table = x.detach().sin()  # every block takes it, as rotary tables are taken
        for block in self.blocks:
            x = block(x, table)
        return x.sum()


def plan_of(prefetch_bytes: int) -> Plan:
    ops = (
        OpPlacement(position=0, op="aten.mm.default", placement="ssd", nbytes=TENSOR_BYTES),
        OpPlacement(position=1, op="aten.tanh.default", placement="device", nbytes=TENSOR_BYTES),
        OpPlacement(position=2, op="aten.mul.Tensor", placement="ssd", nbytes=TENSOR_BYTES),
    )
    regions = tuple(RegionPlan(name=f"blocks.{i}", input="ssd", ops=ops) for i in range(5))
    return Plan(regions=regions, window_bytes=8 * TENSOR_BYTES, prefetch_bytes=prefetch_bytes)


@pytest.mark.parametrize(("num_tensors", "all_of_them"), [(3, True), (2, False)])
def test_a_window_of_one_region_brings_one_region(tmp_path, monkeypatch, num_tensors, all_of_them):
    ahead: dict[str, list[bool]] = {}
    real = ActivationEngine._fetch_ahead

    def fetch_ahead(self, frame):
        real(self, frame)
        own = [s for s in frame.waiting() if not (isinstance(s, SharedInput) and s.num_users > 1)]
        stored = [s._stored if isinstance(s, SharedInput) else s for s in own]
        away = [s for s in stored if not isinstance(s, DeviceStored)]
        assert len(away) < len(stored), "what is kept on the device takes none of the window"
        ahead[frame.name] = [s._reading is not None for s in away]

    torch.manual_seed(0)
    model = Model()
    x = torch.randn(ROWS, WIDTH)
    budget = memopt.Budget(ssd=f"{tmp_path}:64MiB")
    with memopt.optimize(model, plan=plan_of(num_tensors * TENSOR_BYTES), budget=budget) as run:
        for step in range(2):
            if step == 1:
                run._engine.transfers.finish()
                monkeypatch.setattr(ActivationEngine, "_fetch_ahead", fetch_ahead)
            model(x).backward()
    assert set(ahead) == {f"blocks.{i}" for i in range(4)}
    for name in ("blocks.1", "blocks.2", "blocks.3"):
        assert len(ahead[name]) == 3, "input, mm, mul"
        assert all(ahead[name]) == all_of_them
        assert ahead[name][0]
