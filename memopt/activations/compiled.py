"""Compiled modules: a compiled block is a region like any other, a compiled whole is refused.

`torch.compile(block)` makes a module whose `forward` is the compiled function; `block.compile()`
puts the compiled function at `_compiled_call_impl`, which `Module.__call__` takes before it looks
at `forward`. memopt patches whichever of the two a call goes through, so a compiled block runs
compiled inside its region, forward and recomputation, and its bits are those of the same loop
without memopt. The modes see little or nothing of what Inductor's kernels do: such a region is
placed by its input and recomputed as a whole.

What is compiled *around* regions is another matter: Dynamo traces through the patched modules into
one graph, in which there is no region call any more. The numbers would be right and the memory
would not move, so it is refused with what to write instead.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

from torch.nn import Module

from memopt.types.errors import ConfigError

_NUM_NAMED = 3
_UNSEEN = (
    "the model has gradients, but no forward of it was seen, so nothing was placed: does the loop "
    "call something else, such as torch.compile(model) or a compiled function around it? Compile "
    "the blocks instead (for block in model.layers: block.compile()), and call the model itself"
)


def is_compiled_in_place(module: Module) -> bool:
    """Whether `module.compile()` was called (the attribute is torch's own since 2.2)."""
    return module.__dict__.get("_compiled_call_impl") is not None


def is_compiled(module: Module) -> bool:
    """Whether a call of this module runs a compiled function, made in either way."""
    # Importing Dynamo takes a second; without it nothing can have been compiled.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    optimized = getattr(dynamo, "OptimizedModule", None)
    return is_compiled_in_place(module) or (optimized is not None and isinstance(module, optimized))


def refuse_compiled_around(model: Module, regions: Sequence[tuple[str, Module]]) -> None:
    """Refuse a model in which something compiled contains a region, or which is compiled itself.

    Raises:
        ConfigError: names what is compiled, and what to compile instead.
    """
    chosen = {id(module) for _, module in regions}
    for name, module in model.named_modules():
        if not is_compiled(module) or id(module) in chosen:
            continue
        inside = [n for n, m in regions if m is not module and _contains(module, m)]
        if not inside and name:
            continue
        raise ConfigError(_refusal(name, module, inside))


def refuse_cuda_graphs(regions: Sequence[tuple[str, Module]]) -> None:
    """Refuse regions that were compiled with CUDA graphs (without CUDA the setting does nothing).

    Raises:
        ConfigError: names the regions, and the modes that can be used instead.
    """
    names = [name for name, module in regions if _uses_cuda_graphs(module)]
    if names:
        raise ConfigError(
            f"{_listed(names)}: compiled with CUDA graphs (mode 'reduce-overhead' or "
            "'max-autotune'), which own the memory of their outputs and write over it when a block "
            "is recomputed; compile the blocks with mode='default' or "
            "'max-autotune-no-cudagraphs' instead"
        )


def _uses_cuda_graphs(module: Module) -> bool:
    if not is_compiled(module) or not any(p.is_cuda for p in module.parameters()):
        return False
    compiled = module._compiled_call_impl if is_compiled_in_place(module) else module
    ask = getattr(compiled, "get_compiler_config", None)
    config: Any = ask() if ask is not None else None  # Inductor's; other backends have none
    return bool(config and config.get("triton.cudagraphs"))


def _contains(outer: Module, inner: Module) -> bool:
    return any(module is inner for module in outer.modules())


def _refusal(name: str, module: Module, inside: list[str]) -> str:
    what = f"module {name!r}" if name else "the model"
    how = "with .compile()" if is_compiled_in_place(module) else "with torch.compile(...)"
    undo = (
        "leave that call out"
        if is_compiled_in_place(module)
        else "use the module that was given to torch.compile"
    )
    of = f" of {_listed(inside)}" if inside else ""
    return (
        f"{what} is compiled as a whole ({how}): its calls{of} become one graph in which memopt "
        f"can place nothing; {undo}, and compile the blocks instead, which run compiled inside "
        "their regions: for block in model.layers: block.compile()"
    )


def compiled_notes(regions: Sequence[tuple[str, Module]], device: str) -> list[str]:
    """Return what the report says about compiled regions; empty where there is none."""
    names = [name for name, module in regions if is_compiled(module)]
    if not names:
        return []
    note = (
        f"{_listed(names)} run compiled, forward and recomputation; what happens inside compiled "
        "kernels is not seen: these regions are placed by their input and recomputed as a whole"
    )
    accounted = ", and their inner tensors are missing from the accounted bytes"
    return [note + accounted if device == "cpu" else note]


def note_unseen_forward(model: Module, notes: list[str], *, warn: bool) -> None:
    """Note, and warn if asked to, that gradients came from no forward that memopt saw.

    The loop calls something else than the model it gave: `torch.compile(model)`, a compiled
    function around it, a copy.
    """
    if _UNSEEN in notes or all(p.grad is None for p in model.parameters()):
        return
    notes.append(_UNSEEN)
    if warn:
        warnings.warn(f"memopt: {_UNSEEN}", stacklevel=4)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NUM_NAMED])
    left = len(names) - _NUM_NAMED
    return f"{shown} and {left} more" if left > 0 else shown
