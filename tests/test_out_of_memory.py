"""Out of device memory inside the context: memopt's table and the next step to take, the error itself unchanged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memopt
from memopt.types.budget import HostFacts


def test_the_table_is_printed_and_the_error_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(3)))
    forward = model.forward
    with (
        pytest.raises(torch.OutOfMemoryError, match="no more"),
        memopt.optimize(model, plan="recompute"),
    ):
        model(torch.randn(4, 8)).sum().backward()
        raise torch.OutOfMemoryError("no more")
    printed = capsys.readouterr().err
    assert "device peak" in printed
    assert "raise the device budget" in printed
    assert model.forward == forward


def test_a_step_that_the_machine_has_no_room_for_ends_before_it_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the device is host memory, nothing else stands between a step and the system's killer."""
    facts = HostFacts(limit_bytes=1 << 40, free_bytes=8 << 20)
    model = nn.Sequential(
        *(nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 256)) for _ in range(4))
    )
    x = torch.randn(256, 256)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with memopt.optimize(model, plan="recompute"):
        model(x).sum().backward()
    assert all(map(torch.equal, expected, (p.grad for p in model.parameters())))
    model.zero_grad()
    with monkeypatch.context() as patch:
        patch.setattr("memopt._resources.host_facts", lambda: facts)
        with (
            pytest.raises(memopt.BudgetError, match="has room for: the system would kill"),
            memopt.optimize(model, plan="recompute", budget=memopt.Budget(device="4GiB")),
        ):
            model(torch.randn(32 << 10, 256)).sum().backward()
    model.zero_grad()
    model(x).sum().backward()
    assert all(map(torch.equal, expected, (p.grad for p in model.parameters())))
