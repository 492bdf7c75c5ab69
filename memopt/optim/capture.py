"""Counters and learning rate on the device, so that a captured step can be replayed.

A CUDA graph repeats kernels with the arguments they were captured with. What changes from step to
step is therefore read from device memory: the learning rate (written by `begin_step`, so that
schedulers work), the bias corrections' step counters (advanced by the graph itself), and the tables
of the current layout (filled in place at a switch, which happens outside of the graph).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from memopt.ops.counter_rng import MASK32
from memopt.ops.transfer import PinnedRoom
from memopt.optim.rules import StateFullRule
from memopt.optim.settings import Settings


class DeviceClock:
    """The device's copy of one bucket's counters, for the parameters of one table.

    Args:
        num_tensors: parameters in the table.
        room: through which the counters go to their device.
    """

    def __init__(self, num_tensors: int, room: PinnedRoom) -> None:
        self.room, device = room, room.device
        self.lr = torch.zeros(1, dtype=torch.float32, device=device)
        self.steps = torch.zeros(num_tensors, dtype=torch.float32, device=device)
        self.calls = torch.zeros(1, dtype=torch.int64, device=device)
        self.scalars = torch.zeros(4 + 2 * num_tensors, dtype=torch.float32, device=device)
        self.captured = False  # whether a graph advances these counters

    def set(self, lr: float | Tensor, steps: Sequence[int], calls: int) -> None:
        """Write what the next step shall start from: `steps` completed updates of each parameter."""
        if isinstance(lr, Tensor):
            self.lr.copy_(lr.view(1))
        else:
            self.lr.fill_(lr)
        self.room.copy_into(self.steps, np.array(steps, dtype=np.float32))
        self.calls.fill_(calls)

    def tick(self, settings: Settings, full: StateFullRule) -> None:
        """Advance on the device and compute the step's scalars; part of the captured graph."""
        numbers = [
            *settings.betas, settings.weight_decay, settings.full_scale, settings.free_scale,
        ]  # fmt: skip
        choices = [full.native_code, settings.seed & MASK32]
        torch.ops.memopt.frugal_clock(
            self.lr, self.steps, self.calls, self.scalars, numbers, choices
        )
