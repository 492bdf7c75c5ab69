"""Finding the regions of a model: which module calls are recomputed as a unit.

A region is a transformer block or what plays its part: a child of a list (`ModuleList` or
`Sequential`) of blocks. Every outermost such list counts, so an encoder-decoder has two and a
ResNet four; a list whose children are stages (lists of normalised blocks themselves) is entered,
a list of experts inside a block is not. A child that nothing can call (a list of a layer's parts)
gives its own children. A flat `Sequential` of layers is cut into runs of children of about equal
bytes. Users may name regions instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import Module, ModuleDict, ModuleList, Sequential

from memopt.activations.compiled import refuse_compiled_around, refuse_cuda_graphs
from memopt.types.errors import ConfigError

RegionSpec = Sequence[str | Module] | Callable[[str, Module], bool] | None

_MIN_SHARE = 0.02


def find_regions(model: Module, spec: RegionSpec = None) -> list[tuple[str, Module]]:
    """Return (qualified name, module) of every region, in definition order, none in another.

    Args:
        model: the model.
        spec: None to find them, or names (a list's name means its children), modules, or a
            predicate of (name, module).

    Raises:
        ConfigError: a name or module that the model does not have, regions inside regions, a
            predicate that matches nothing, something compiled around regions, or compiled with
            CUDA graphs.
    """
    chosen = _automatic(model) if spec is None else _given(model, spec)
    unique = {id(m): (n, m) for n, m in reversed(chosen)}
    regions = [(n, m) for n, m in chosen if unique.pop(id(m), None) is not None]
    _refuse_nesting(regions)
    refuse_compiled_around(model, regions)
    refuse_cuda_graphs(regions)
    return regions


def _automatic(model: Module) -> list[tuple[str, Module]]:
    total = max(1, _weight(model))
    regions: list[tuple[str, Module]] = []
    for name, container in _outermost_lists(model, ""):
        children = [(n, c) for n, c in _called_parts(container, name) if _weight(c) > 0]
        if sum(_weight(c) for _, c in children) < _MIN_SHARE * total:
            continue
        regions.extend(children)
    return regions or _largest_children(model, total)


def _called_parts(container: Module, name: str) -> Iterator[tuple[str, Module]]:
    """Yield a container's children; in place of one that is never called, its own.

    Models keep the parts of a layer in a list or dictionary, too: `for norm, attention in layers`.
    Without a forward nothing can call that. Its small parts (norms) are no regions.
    """
    for child_name, child in container.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if _can_be_called(child):
            yield path, child
            continue
        least = _MIN_SHARE * _weight(child)
        yield from ((n, c) for n, c in _called_parts(child, path) if _weight(c) > least)


def _can_be_called(module: Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):  # torch keeps its forward elsewhere
        return True
    return type(module).forward is not Module.forward or "forward" in module.__dict__


def _outermost_lists(module: Module, name: str) -> Iterator[tuple[str, Module]]:
    if _is_list_of_blocks(module):
        nested = [
            found
            for child_name, child in module.named_children()
            for found in _outermost_lists(child, f"{name}.{child_name}" if name else child_name)
        ]
        covered = sum(_weight(m) for _, m in nested)
        if nested and covered > 0.5 * _weight(module) and all(_are_stages(m) for _, m in nested):
            yield from nested
        else:
            yield name, module
        return
    for child_name, child in module.named_children():
        yield from _outermost_lists(child, f"{name}.{child_name}" if name else child_name)


def _is_list_of_blocks(module: Module) -> bool:
    if not isinstance(module, (ModuleList, Sequential, ModuleDict)):
        return False
    children = list(module.children())
    composed = [c for c in children if any(True for _ in c.children())]
    return len(children) > 1 and len(composed) >= 0.5 * len(children) and _weight(module) > 0


def _are_stages(module: Module) -> bool:
    """Whether a nested list holds blocks (they normalise), and not experts (they do not)."""
    return all(_normalises(child) for child in module.children())


def _normalises(module: Module) -> bool:
    return any("norm" in type(m).__name__.lower() for m in module.modules())


def _largest_children(model: Module, total: int) -> list[tuple[str, Module]]:
    """No list of blocks: the root's own children that hold weights, its head excepted."""
    flat = [(n, m) for n, m in model.named_modules() if is_flat_sequential(m)]
    if flat and _weight(flat[0][1]) > 0.5 * total:
        return flat[:1]
    children = [(n, c) for n, c in _called_parts(model, "") if _weight(c) > _MIN_SHARE * total]
    return [(n, c) for n, c in children if not isinstance(c, (torch.nn.Linear, torch.nn.Embedding))]


def is_flat_sequential(module: Module) -> bool:
    """Whether a Sequential is to be cut into runs of its children (runs.py)."""
    return isinstance(module, Sequential) and len(module) >= 4 and not _is_list_of_blocks(module)


def _weight(module: Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _given(model: Module, spec: Any) -> list[tuple[str, Module]]:
    named = dict(model.named_modules())
    if callable(spec) and not isinstance(spec, Module):
        chosen = [(n, m) for n, m in named.items() if n and _asked(spec, n, m)]
        if not chosen:
            raise ConfigError("regions: the predicate matched no module of the model")
        return chosen
    if isinstance(spec, (str, Module)):
        spec = [spec]
    if not isinstance(spec, Iterable):
        raise ConfigError(
            f"regions={spec!r}: give a list of names or modules, or a function of (name, module)"
        )
    names = {id(m): n for n, m in named.items()}
    chosen = []
    for item in spec:
        name = names.get(id(item)) if isinstance(item, Module) else item
        if name is None:
            raise ConfigError(f"regions: {type(item).__name__} is not a module of the model")
        if name not in named:
            close = [n for n in named if n.endswith(str(name)) or str(name) in n][:3]
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise ConfigError(f"regions: the model has no module {name!r}{hint}")
        module = named[name]
        if isinstance(module, (ModuleList, ModuleDict)) or not _can_be_called(module):
            chosen.extend(_called_parts(module, name))
        else:
            chosen.append((name, module))
    return chosen


def _asked(predicate: Callable[[str, Module], bool], name: str, module: Module) -> bool:
    try:
        inspect.signature(predicate).bind(name, module)
    except TypeError as error:
        raise ConfigError(
            f"regions: the function must take a module's name and the module ({error})"
        ) from error
    except ValueError:  # a builtin that tells no signature
        pass
    return predicate(name, module)


def _refuse_nesting(regions: list[tuple[str, Module]]) -> None:
    owners: dict[int, str] = {}
    for name, module in regions:
        for inner in module.modules():
            if inner is not module:
                owners[id(inner)] = name
    for name, module in regions:
        if id(module) in owners:
            raise ConfigError(f"regions: {name!r} lies inside region {owners[id(module)]!r}")
