"""What the dispatch modes must know of an op, worked out once per overload.

A mode pays for every op it sees, so each question ("does it write?", "does it draw random
numbers?") is answered from the schema the first time and looked up afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# Ops whose schema declares no write although they update running statistics in place:
# overload packet name -> positions of the tensors written.
_UNDECLARED_WRITES: dict[str, tuple[int, ...]] = {
    "aten.native_batch_norm": (3, 4),
    "aten.cudnn_batch_norm": (3, 4),
    "aten.miopen_batch_norm": (3, 4),
    "aten.batch_norm_update_stats": (1, 2),
    "aten.batch_norm_gather_stats": (3, 4),
    "aten.batch_norm_gather_stats_with_counts": (3, 4),
}

# Outputs of these may be filled later by a writer that the dispatcher does not see.
_FACTORIES = frozenset(
    f"aten.{name}"
    for name in (
        "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty",
        "new_empty_strided", "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones",
        "full", "full_like", "new_full", "arange", "scalar_tensor", "eye", "linspace",
    )
)  # fmt: skip

# Ops that come and go: `detach`, and questions about shapes (nested tensors cache the answers).
_UNNUMBERED = frozenset(
    f"aten.{name}"
    for name in ("detach", "sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "dim")
)

_ATTENTION_WORDS = ("attention", "flash_attn", "flex_attention", "fmha")

_MATMULS = frozenset(
    f"aten.{name}"
    for name in (
        "mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm", "_scaled_grouped_mm",
        "convolution", "_scaled_mm_v2", "mkldnn_linear",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class OpFacts:
    """Facts of one op overload.

    Args:
        name: "namespace.op.overload".
        unnumbered: never counted as an op of the region.
        casts: `_to_copy`, which autocast leaves out when its weight cache answers.
        written_args, written_kwargs: where tensors that the op writes to stand.
        kind: "attention", "matmul", "random", "factory" or "other".
        dropout_arg: name of the dropout probability of an attention op that draws numbers.
    """

    name: str
    unnumbered: bool
    casts: bool
    written_args: tuple[int, ...]
    written_kwargs: tuple[str, ...]
    kind: str
    dropout_arg: int | None

    @property
    def writes(self) -> bool:
        """Whether the op writes to any of its arguments."""
        return bool(self.written_args or self.written_kwargs)


_FACTS: dict[Any, OpFacts] = {}


def facts_of(func: Any) -> OpFacts:
    """Return the facts of an op overload or higher-order op."""
    facts = _FACTS.get(func)
    if facts is None:
        facts = _FACTS[func] = _derive(func)
    return facts


def _derive(func: Any) -> OpFacts:
    name = str(func)
    packet = name.rsplit(".", 1)[0]
    schema = getattr(func, "_schema", None)
    args: list[int] = []
    kwargs: list[str] = []
    dropout: int | None = None
    for index, argument in enumerate(schema.arguments if schema is not None else ()):
        alias = argument.alias_info
        if alias is not None and alias.is_write:
            (kwargs.append(argument.name) if argument.kwarg_only else args.append(index))
        if argument.name in ("dropout_p", "p_dropout"):
            dropout = index
    args.extend(i for i in _UNDECLARED_WRITES.get(packet, ()) if i not in args)
    return OpFacts(
        name=name,
        unnumbered=packet in _UNNUMBERED,
        casts=packet == "aten._to_copy",
        written_args=tuple(args),
        written_kwargs=tuple(kwargs),
        kind=_kind(func, packet),
        dropout_arg=dropout,
    )


def _kind(func: Any, packet: str) -> str:
    if any(word in packet for word in _ATTENTION_WORDS):
        return "attention"
    if packet in _FACTORIES:
        return "factory"
    if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
        return "random"
    return "matmul" if packet in _MATMULS else "other"


def draws_numbers(facts: OpFacts, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call of an attention op advances a random generator."""
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return False
    if facts.dropout_arg is None:
        return True
    argument = func._schema.arguments[facts.dropout_arg]
    value = (
        args[facts.dropout_arg]
        if facts.dropout_arg < len(args)
        else kwargs.get(argument.name, argument.default_value)
    )
    return bool(value != 0.0)
