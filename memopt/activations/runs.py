"""A flat `Sequential` cut into runs of children: regions where a model has no blocks.

The cut is at about equal bytes of outputs, found by running the children on fake tensors of the
first call's shape; sqrt(n) runs keep the sum of stored inputs and one run's inside small
(Chen et al., 2016, "Training Deep Nets with Sublinear Memory Cost").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Sequential

from memopt.activations.patch import PatchedForward
from memopt.activations.tensors import nbytes_of

Handler = Callable[[PatchedForward, tuple[Any, ...], dict[str, Any]], Any]


class RunsPatch(PatchedForward):
    """Stands in for a `Sequential`'s forward and calls its runs as regions."""

    def __init__(self, module: Sequential, name: str, handler: Handler) -> None:
        super().__init__(module, name, self._run)
        self._region_handler = handler
        self._runs: list[PatchedForward] | None = None

    def _run(self, patch: PatchedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.attribute != "forward":  # compiled in place: one call, so one region
            return self._region_handler(patch, args, kwargs)
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            return patch.plain(*args, **kwargs)
        if self._runs is None:
            self._runs = self._cut(args[0])
        value: Any = args[0]
        for run in self._runs:
            value = run(value)
        return value

    def _cut(self, example: Tensor) -> list[PatchedForward]:
        children = list(self.module.named_children())
        sizes = output_bytes([c for _, c in children], example)
        patches = []
        glued = [_writes_input(child) for _, child in children]
        for begin, end in equal_cuts(sizes, max(2, math.isqrt(len(children))), glued):
            part = Sequential(*(child for _, child in children[begin:end]))
            part.training = self.module.training
            span = f"{children[begin][0]}-{children[end - 1][0]}"
            name = f"{self.name}.{span}" if self.name else span
            patches.append(PatchedForward(part, name, self._region_handler))
        return patches


def _writes_input(module: Module) -> bool:
    """Whether a layer works in place: its run must begin with what it writes to."""
    return bool(getattr(module, "inplace", False))


def equal_cuts(sizes: list[int], num_runs: int, glued: list[bool]) -> list[tuple[int, int]]:
    """Cut into at most `num_runs` half-open runs of about equal sums, none empty.

    No run begins with a child that is `glued` to the one before.
    """
    total = sum(sizes)
    cuts: list[tuple[int, int]] = []
    begin = 0
    seen = 0
    for index, size in enumerate(sizes):
        seen += size
        if index + 1 < len(sizes) and glued[index + 1]:
            continue
        if seen * num_runs >= total * (len(cuts) + 1) and len(cuts) < num_runs - 1:
            cuts.append((begin, index + 1))
            begin = index + 1
    if begin < len(sizes):
        cuts.append((begin, len(sizes)))
    return cuts


def output_bytes(children: list[Module], example: Tensor) -> list[int]:
    """Bytes of each child's output on fake tensors; equal weights where that fails."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    sizes = []
    try:
        with torch.no_grad(), mode:
            value: Any = mode.from_tensor(example.detach())
            for child in children:
                state: dict[str, Tensor] = {
                    n: mode.from_tensor(t.detach())
                    for n, t in child.state_dict(keep_vars=True).items()
                }
                value = torch.func.functional_call(child, state, (value,))
                sizes.append(nbytes_of(value))
    except Exception:  # noqa: BLE001 - any module may fail on fake tensors; equal cuts are exact too
        return [1] * len(children)
    return sizes
