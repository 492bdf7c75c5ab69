"""Which parameters of a model are split, and which always keep their state.

FRUGAL's recipe (arXiv 2411.07837): the linear weights inside the blocks are split; embeddings,
norms, biases and the output head keep full AdamW state, are never reset and never scaled: the head
suffers most from sign updates. `frugal_groups` finds these roles in any torch model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from memopt.optim.settings import Settings
from memopt.optim.tensors import matrix_shape

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """One parameter and what became of it."""

    name: str
    role: str
    split: bool
    num_elements: int


class FrugalGroups(list[dict[str, Any]]):
    """Parameter groups for `Frugal`; printing them shows a table."""

    def __init__(self, groups: Iterable[dict[str, Any]], assignments: Iterable[Assignment]) -> None:
        super().__init__(groups)
        self.assignments = tuple(assignments)

    def state_bytes(self, *, moment_bytes: int = 8) -> int:
        """Return the state's bytes; `moment_bytes`: all moments of one element (AdamW fp32: 8)."""
        return sum(_group_bytes(group, moment_bytes) for group in self)

    def table(self) -> Table:
        """Return a rich table: roles, tensors, elements, what they keep."""
        table = Table("role", "update", "tensors", "elements", "example", title="FRUGAL groups")
        for (role, split), members in self._by_role().items():
            elements = sum(member.num_elements for member in members)
            update = f"split, density {self[0]['density']:g}" if split else "always full"
            row = [role, update, str(len(members)), f"{elements:,}", members[0].name]
            table.add_row(*row)
        return table

    def _by_role(self) -> dict[tuple[str, bool], list[Assignment]]:
        found: dict[tuple[str, bool], list[Assignment]] = {}
        for assignment in self.assignments:
            found.setdefault((assignment.role, assignment.split), []).append(assignment)
        return dict(sorted(found.items(), key=lambda item: not item[0][1]))

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=110).print(self.table())
        return text.getvalue()


def as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Return parameter groups as they are; parameters, or pairs with names, as one that is split."""
    found = list(params)
    if all(isinstance(item, dict) for item in found):
        return found
    return [{"params": found}]


def _group_bytes(group: dict[str, Any], moment_bytes: int) -> int:
    from memopt.optim.selections import selection_named
    from memopt.optim.tensors import share

    params = [param for _, param in group["params"]]
    if not group.get("split", True):
        return moment_bytes * int(sum(param.numel() for param in params))
    density, kind = group["density"], group.get("selection", "blocks")
    if kind == "blocks":
        return moment_bytes * share(density, sum(param.numel() for param in params))
    total = 0.0
    for param in params:
        selection = selection_named(kind, param.dim())
        rows, columns = matrix_shape(param.shape)
        basis = param.element_size() if selection.low_rank else 0
        total += selection.state_bytes(
            rows, columns, density, moment_bytes=moment_bytes, basis_bytes=basis
        )
    return int(total)


def frugal_groups(
    model: nn.Module,
    density: float = 0.25,
    always_full: Iterable[str] = (),
    *,
    split: Iterable[str] = (),
    **settings: Any,
) -> FrugalGroups:
    """Sort a model's trainable parameters into a split group and one that keeps its state.

    Args:
        model: any module.
        density: of the split group.
        always_full: shell-style patterns of parameter names that shall never be split.
        split: patterns of names that shall be split though their role says otherwise.
        **settings: further settings of the split group, such as `selection`.

    Returns:
        Groups for `Frugal(...)`; `print(groups)` shows them as a table.

    Raises:
        ValueError: for a pattern that matches nothing, a setting that no group has, or a model
            without trainable parameters.
    """
    allowed = [field.name for field in fields(Settings) if field.name not in {"density", "split"}]
    if unknown := sorted(settings.keys() - set(allowed)):
        raise ValueError(
            f"frugal_groups got {unknown}, which are no settings of a group: choose from {allowed}"
        )
    always_full, split = list(always_full), list(split)
    roles = _roles(model)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("the model has no trainable parameters")
    for pattern in (*always_full, *split):
        if not any(fnmatchcase(name, pattern) for name, _ in named):
            raise ValueError(f"pattern {pattern!r} matches no trainable parameter of the model")
    assignments = []
    for name, param in named:
        chosen = roles[name] == "linear in a block"
        chosen |= any(fnmatchcase(name, pattern) for pattern in split)
        chosen &= not any(fnmatchcase(name, pattern) for pattern in always_full)
        assignments.append(
            Assignment(name=name, role=roles[name], split=chosen, num_elements=param.numel())
        )
    where = {assignment.name: assignment.split for assignment in assignments}
    groups = [
        {"params": [item for item in named if where[item[0]]], "density": density, **settings},
        {"params": [item for item in named if not where[item[0]]], "split": False,
         "state_full": "adamw"},
    ]  # fmt: skip
    return FrugalGroups([group for group in groups if group["params"]], assignments)


def _roles(model: nn.Module) -> dict[str, str]:
    """Return the role of every parameter name (tied parameters under their first name)."""
    in_blocks = {id(p) for block in _blocks(model) for p in block.parameters()}
    embedded = {
        id(p) for m in model.modules() if isinstance(m, _EMBEDDINGS) for p in m.parameters()
    }
    norms = {
        id(p) for m in model.modules() if "Norm" in type(m).__name__ for p in m.parameters(False)
    }
    roles = {}
    for name, param in model.named_parameters():
        if id(param) in embedded:
            roles[name] = "embedding"
        elif "bias" in name.rpartition(".")[2]:  # experts have biases of two dimensions
            roles[name] = "bias"
        elif param.dim() < 2 or id(param) in norms:
            roles[name] = "norm or vector"
        elif in_blocks and id(param) not in in_blocks:
            roles[name] = "output head or other"
        else:
            roles[name] = "linear in a block"
    if not in_blocks:  # a model without repeated blocks: every matrix but the last
        for name in [name for name, role in roles.items() if role == "linear in a block"][-1:]:
            roles[name] = "output head or other"
    return roles


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the repeated blocks: children of one class in the outermost lists that repeat them.

    A block is no single layer: a flat Sequential of Linear modules is not a list of blocks.
    """
    for child in model.children():
        if isinstance(child, _CONTAINERS):
            classes = Counter(
                type(part) for part in child.children() if any(True for _ in part.children())
            )
            repeated = {kind for kind, count in classes.items() if count >= 2}
            if repeated:
                yield from (part for part in child.children() if type(part) in repeated)
                continue
        yield from _blocks(child)
