"""What a session takes over of what stands around the model: its own checkpointing, wrapped optimizers."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.nn import Module

from memopt._steps import Steps
from memopt.types.errors import ConfigError

UNSTEPPED = (
    "the given optimizer's step() was never called inside the context, so the first step never "
    "ended and no plan was made: give the optimizer whose step() the loop calls, or none"
)
_MANY_ROOTS = 512


class CheckpointingOff:
    """Switches a model's own gradient checkpointing off, and on again.

    Trainers switch it on when training begins, inside the context: asked at each root forward, else
    regions would be recomputed twice.
    """

    def __init__(self, model: Module) -> None:
        self._model = model
        self._switched: list[Module] = []

    def switch(self) -> str:
        """Switch off what is on; return a note, empty where nothing was."""
        found = [
            m for m in self._model.modules() if m.__dict__.get("gradient_checkpointing") is True
        ]
        for module in found:
            module.__dict__["gradient_checkpointing"] = False
        self._switched.extend(found)
        if not found:
            return ""
        return (
            f"the model's own gradient checkpointing was on ({len(found)} modules): memopt takes it "
            "over while the context is open"
        )

    def restore(self) -> None:
        """Switch on what was on."""
        for module in self._switched:
            module.__dict__["gradient_checkpointing"] = True
        self._switched = []


def warn_unstepped(optimizer: torch.optim.Optimizer | None, steps: Steps) -> None:
    """Say, while it can still be changed, that the traced step does not end."""
    if optimizer is not None and not steps.num_steps and steps.figures.num_roots == _MANY_ROOTS:
        warnings.warn(
            f"memopt: {_MANY_ROOTS} forwards and no step() of the given optimizer: the first step, "
            "which is traced and slow, goes on. Give memopt.optimize the optimizer whose step() the "
            "loop calls, or none: then a step ends at the next forward after a backward",
            stacklevel=2,
        )


def stepping_optimizer(optimizer: Any) -> torch.optim.Optimizer | None:
    """Return the optimizer whose `step()` changes weights: what accelerate and others wrap.

    Raises:
        ConfigError: it is none, nor the wrapper of one.
    """
    if optimizer is None:
        return None
    inner = optimizer
    while not hasattr(inner, "_optimizer_step_pre_hooks"):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            kind = type(optimizer).__name__
            raise ConfigError(
                f"optimizer is a {kind}, not a torch.optim.Optimizer or the wrapper of one (with an "
                "`optimizer` attribute); give the one whose step() comes last, or leave it out: then "
                "a step ends at the next forward after a backward"
            )
    return inner  # type: ignore[no-any-return]
