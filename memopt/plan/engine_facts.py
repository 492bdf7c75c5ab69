"""What the planner takes for granted of the engine that runs its plans. Facts, no code: solver and validator obey both.

Each fact names what the engine must do; change the two together.
"""

from __future__ import annotations

MIN_MOVE_BYTES = 1 << 16
"""Tensors smaller than this stay on the device whatever a plan says: a transfer costs more than they weigh."""

DRAINS_BEFORE_BACKWARD = True
"""Whether the first recompute of a backward makes compute wait for every copy out and lets go of its source.

Without it a full window stays allocated through the whole backward: sources are let go of when a copy is *seen* to
have ended, and the program queues kernels far ahead of the device, so it may never see it. The wait costs nothing
where what runs outside regions (head, loss) takes longer than a window's copy.
"""
