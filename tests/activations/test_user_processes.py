"""Processes that start while the context is open: workers, and whoever else forks inside the loop."""

from __future__ import annotations

import json
import os

import pytest
import torch
from _bitwise import spill_directory
from _traps import Net, Sines, batch, simple_step

import memopt


def _figures(model: torch.nn.Module) -> list[float]:
    """One step's loss and gradients, as numbers that JSON keeps exactly."""
    model.zero_grad()
    loss, _ = simple_step(model, 5)
    return [loss.item(), *(p.grad.double().sum().item() for p in model.parameters())]


@pytest.mark.parametrize("engine", ["threads", "auto"])
def test_a_forked_child_has_the_plain_model(engine, monkeypatch):
    """Without it: the child waited for I/O threads that it does not have, for ever (or was refused)."""
    for module in ("engine", "modes"):
        monkeypatch.setattr(f"memopt.activations.{module}.MIN_MOVE_BYTES", 1)
    torch.manual_seed(0)
    model = Net(Sines)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with spill_directory() as path:
        budget = memopt.Budget(ssd=f"{path}:16MiB")
        with memopt.optimize(model, optimizer, plan="ssd", engine=engine, budget=budget) as run:
            for i in range(3):
                simple_step(model, i)
                optimizer.step()
                optimizer.zero_grad()
            pending = model(batch(9)).square().mean()
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    figures = _figures(model)
                    optimizer.step()
                    patched = any("forward" in vars(m) for m in model.modules())
                    try:
                        pending.backward()
                        refused = ""
                    except memopt.MemoptError as error:
                        refused = str(error)
                    os.write(writer, json.dumps([figures, patched, refused]).encode())
                    code = 0
                finally:
                    os._exit(code)
            os.close(writer)
            with os.fdopen(reader) as pipe:
                said = json.loads(pipe.read())
            assert os.waitpid(child, 0)[1] == 0
            assert said[:2] == [_figures(model), False]
            assert "call backward where forward ran" in said[2]
            assert any("forward" in vars(m) for m in model.modules()), "the parent's own context"
            pending.backward()
            optimizer.step()
        assert run.report().num_steps == 4


def test_workers_of_a_loader_may_hold_the_model():
    class Evaluated(torch.utils.data.Dataset):
        def __init__(self, model: torch.nn.Module) -> None:
            self.model = model

        def __len__(self) -> int:
            return 4

        def __getitem__(self, i: int) -> torch.Tensor:
            with torch.no_grad():
                return self.model(batch(i))

    torch.manual_seed(0)
    model = Net(Sines)
    with memopt.optimize(model, plan="recompute"):
        simple_step(model, 0)
        loader = torch.utils.data.DataLoader(
            Evaluated(model), num_workers=2, multiprocessing_context="fork"
        )
        for i, got in enumerate(loader):
            assert torch.equal(got[0], model(batch(i)))
            simple_step(model, i)
