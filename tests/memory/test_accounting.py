"""Accounted memory beside other modes: each counts until it ends itself, in whatever order they end."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import memopt
from memopt.memory import accounting
from memopt.memory.accounting import AccountedMemory

MIB = 1 << 20


def tensor(mib: int) -> torch.Tensor:
    return torch.empty(mib * MIB, dtype=torch.uint8)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_modes_end_in_any_order(order):
    modes = [AccountedMemory() for _ in range(3)]
    for mode in modes:
        mode.__enter__()
    held = [tensor(1)]
    counts = [1, 1, 1]
    active = {0, 1, 2}
    for which in order:
        modes[which].__exit__(None, None, None)
        active.discard(which)
        held.append(tensor(1))
        for k in active:
            counts[k] += 1
        assert [mode.current_bytes // MIB for mode in modes] == counts
    assert _get_current_dispatch_mode_stack() == []


def test_a_session_goes_on_when_an_earlier_one_stops():
    models = [nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(2)]
    runs = [memopt.start(model, regions=["0"]) for model in models]
    runs[0].stop()
    for _ in range(3):
        models[1](torch.ones(8192, 64)).sum().backward()
    runs[1].stop()
    states = 2 * sum(p.nbytes for p in models[1].parameters())
    assert runs[1].report().measured.device_bytes > states + 8192 * 64 * 4
    assert _get_current_dispatch_mode_stack() == []


def test_an_interrupt_is_not_lost_where_tensors_die():
    """Python ignores what a weak reference's callback raises: one Ctrl-C in 25 was, and bytes stayed counted."""
    with AccountedMemory() as memory:
        tensors = [torch.empty(256) for _ in range(50)]
        level = memory.current_bytes
        entered = []
        sys.setprofile(lambda frame, event, _: entered.append(frame.f_code.co_filename))
        try:
            del tensors
        finally:
            sys.setprofile(None)
        assert not [name for name in entered if name == accounting.__file__]
        assert memory.current_bytes == level - 50 * 1024


def test_threads_that_ask_lose_no_bytes():
    with AccountedMemory() as memory:
        before = memory.current_bytes
        over = threading.Event()
        reader = threading.Thread(
            target=lambda: [memory.current_bytes for _ in iter(over.is_set, True)]
        )
        reader.start()
        for _ in range(3000):
            torch.empty(256)
        over.set()
        reader.join()
        assert memory.current_bytes == before
