"""Out of device memory inside the context: memopt's table and the next step to take, the error itself unchanged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memopt


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
