"""What an extent is; the store in ``extents.py`` makes, fills and frees them."""

from __future__ import annotations

from dataclasses import dataclass, field

from memopt.io.engine import Ticket
from memopt.io.pieces import Kind

__all__ = ["Extent", "Pending", "Run"]


@dataclass(frozen=True, slots=True)
class Run:
    """``nbytes`` (a multiple of the unit) at ``offset`` of file number ``area_index``."""

    area_index: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Pending:
    """A transfer in flight on the units ``[begin, end)`` of an extent."""

    kind: Kind
    begin: int
    end: int
    ticket: Ticket


@dataclass(kw_only=True, eq=False)
class Extent:
    """Space for ``nbytes`` bytes; ``written_bytes`` of them, from the start, can be read back."""

    nbytes: int
    runs: tuple[Run, ...]
    written_bytes: int = 0
    freed: bool = False
    failed: Ticket | None = None  # a write that did not reach the disk
    pending: list[Pending] = field(default_factory=list)

    @property
    def allocated_bytes(self) -> int:
        """Bytes taken from the budget: ``nbytes`` rounded up to the file's unit."""
        return sum(run.nbytes for run in self.runs)
