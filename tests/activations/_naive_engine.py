"""The two-mode engine as one would first draw it, without a single one of the rules that make it exact.

It exists to prove that the trap tests can fail (`test_traps_can_fail.py`). Each region's `forward` is replaced by a
closure that runs the original under PyTorch's checkpoint; a forward mode numbers the ops and keeps, copies or drops
their outputs; a recompute mode answers op k with what was stored for op k and runs the rest. Nothing else: no copy on
write, no care for generators, buffers, caches, unseen writers, parameters, keyword arguments or copies of the model.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

Policy = Callable[[int], str]  # position of an op -> "drop", "keep" (an alias) or "copy"


def policy_of(name: str) -> Policy:
    """`recompute`, `device`, `copy`, `only-POSITION` (keep one op), `not-POSITION` (keep all others), `mix-SEED`."""
    if name.startswith(("only-", "not-")):
        word, _, text = name.partition("-")
        return lambda position: "keep" if (position == int(text)) == (word == "only") else "drop"
    if name.startswith("mix-"):
        rng = random.Random(int(name[4:]))
        table = [rng.choice(("drop", "keep", "copy")) for _ in range(4096)]
        return lambda position: table[position % 4096]
    word = {"recompute": "drop", "device": "keep", "copy": "copy"}[name]
    return lambda position: word


def _is_placeable(func: Any) -> bool:
    return not func._schema.is_mutable and not any(
        r.alias_info is not None for r in func._schema.returns
    )


def _is_numbered(func: Any) -> bool:
    return (
        func is not torch.ops.aten.detach.default
    )  # checkpoint's own hooks detach what they see in recomputation


class _ForwardMode(TorchDispatchMode):
    def __init__(self, policy: Policy, stored: dict[int, Any]) -> None:
        super().__init__()
        self.policy, self.stored, self.position = policy, stored, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not _is_numbered(func):
            return out
        position, self.position = self.position, self.position + 1
        word = self.policy(position)
        if word != "drop" and _is_placeable(func):
            take = torch.clone if word == "copy" else torch.Tensor.detach
            self.stored[position] = torch.utils._pytree.tree_map_only(Tensor, take, out)
        return out


class _RecomputeMode(TorchDispatchMode):
    def __init__(self, stored: dict[int, Any]) -> None:
        super().__init__()
        self.stored, self.position = stored, 0

    def __enter__(self) -> Any:
        self.position = 0
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_numbered(func):
            return func(*args, **(kwargs or {}))
        position, self.position = self.position, self.position + 1
        if position in self.stored:
            return self.stored.pop(position)
        return func(*args, **(kwargs or {}))


def _patched(forward: Callable[..., Any], policy: Policy) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        stored: dict[int, Any] = {}
        modes = (_ForwardMode(policy, stored), _RecomputeMode(stored))
        return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: modes, **kwargs)

    return run


@contextlib.contextmanager
def naive(model: nn.Module, plan: str, regions: list[str]) -> Iterator[None]:
    """Run every child of the lists named by `regions` under the naive engine."""
    blocks = [block for name in regions for block in model.get_submodule(name).children()]
    for block in blocks:
        block.forward = _patched(block.forward, policy_of(plan))
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
