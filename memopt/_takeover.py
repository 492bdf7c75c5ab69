"""What a session takes over of what stands around the model: its own checkpointing, wrapped optimizers."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import Module
from torch.nn.parameter import is_lazy

from memopt._steps import Steps
from memopt.activations.patch import PatchedForward
from memopt.types.errors import ConfigError

UNSTEPPED = (
    "the given optimizer's step() was never called inside the context, so the first step never "
    "ended and no plan was made: give the optimizer whose step() the loop calls, or none"
)
_MANY_ROOTS = 512


def check_model(model: Any) -> None:
    """Refuse what cannot be in a session.

    Raises:
        ConfigError: it is no module, in a session already, or has weights that do not exist yet.
    """
    if not isinstance(model, Module):
        raise ConfigError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    for name, module in model.named_modules():
        where = f"module {name or 'root'!r}"
        if isinstance(module.__dict__.get("forward"), PatchedForward):
            raise ConfigError(
                f"the model is in a memopt session already ({where}); stop that one first"
            )
        lazy = [n for n, p in module._parameters.items() if p is not None and is_lazy(p)]
        if lazy:
            raise ConfigError(
                f"{lazy[0]!r} of {where} has no shape yet (a lazy module): run the model once, "
                "without gradients, before the context and the optimizer"
            )


def check_regions(model: Module, regions: Sequence[tuple[str, Module]]) -> None:
    """Refuse regions that cannot be recomputed.

    Raises:
        ConfigError: one contains TorchScript, or collectives of its own.
    """
    for name, region in regions:
        _check_sharding(model, name, region)
        for module in region.modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise ConfigError(
                    f"region {name!r} contains TorchScript ({module.original_name}): PyTorch's "
                    "checkpointing ends a recomputation by an exception, which TorchScript turns "
                    "into another; use the module that it was made from (block.compile() is today's "
                    "way to make blocks fast), or leave it out of the regions with regions="
                )


def _check_sharding(model: Module, name: str, region: Module) -> None:
    """Refuse what would gather inside of a region: each rank has its own plan, and recomputes what that says."""
    tensors, fsdp = (sys.modules.get(f"torch.distributed.{n}") for n in ("tensor", "fsdp"))
    if tensors is None or not any(isinstance(p, tensors.DTensor) for p in region.parameters()):
        return
    managed = getattr(fsdp, "FSDPModule", ())  # its own hooks gather before forward and backward
    inner = [n for n, m in region.named_modules() if n and isinstance(m, managed)]
    around = any(
        m is region for w in model.modules() if isinstance(w, managed) for m in w.modules()
    )
    if inner or not around:
        what = (
            f"{inner[0]!r} inside of it was" if inner else "neither it nor a module around it was"
        )
        raise ConfigError(
            f"region {name!r} has DTensor weights, and {what} given to fully_shard: ranks would communicate in its "
            "recomputation, each as its own plan says, and wait for one another for ever; shard whole regions "
            "(fully_shard(block)), or name the sharded modules with regions=; tensor parallelism is not supported"
        )


class CheckpointingOff:
    """Switches a model's own gradient checkpointing off, and on again.

    Trainers switch it on when training begins, inside the context: asked at each root forward, else
    regions would be recomputed twice.
    """

    def __init__(self, model: Module) -> None:
        self._model = model
        self._switched: list[Module] = []
        self._wrapped: list[tuple[Module, Any]] = []

    def switch(self) -> str:
        """Switch off what is on; return a note, empty where nothing was."""
        found = [
            m for m in self._model.modules() if m.__dict__.get("gradient_checkpointing") is True
        ]
        for module in found:
            module.__dict__["gradient_checkpointing"] = False
        self._switched.extend(found)
        found += self._unwrap()
        if not found:
            return ""
        return (
            f"the model's own gradient checkpointing was on ({len(found)} modules): memopt takes it "
            "over while the context is open"
        )

    def _unwrap(self) -> list[Module]:
        """Let PyTorch's `checkpoint_wrapper` modules call what they wrap; return those that did not."""
        wrapper = sys.modules.get("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
        if wrapper is None:
            return []
        found = [
            m
            for m in self._model.modules()
            if isinstance(m, wrapper.CheckpointWrapper) and m.__dict__["checkpoint_fn"] is not _call
        ]
        for module in found:
            self._wrapped.append((module, module.__dict__["checkpoint_fn"]))
            module.__dict__["checkpoint_fn"] = _call
        return found

    def restore(self) -> None:
        """Switch on what was on."""
        for module in self._switched:
            module.__dict__["gradient_checkpointing"] = True
        for module, function in self._wrapped:
            module.__dict__["checkpoint_fn"] = function
        self._switched, self._wrapped = [], []


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Stand for a checkpoint function."""
    return function(*args, **kwargs)


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
