"""The state of the parameters of one group that share a device and a dtype.

A bucket owns the arena, says where each parameter's state lies in it in the current round, and
performs a switch. It never allocates after it is built, but for temporaries of one tensor.

[Note: state slices] A checkpoint needs fixed keys and shapes, but with `blocks` the state of a
parameter is anywhere in the arena, or nowhere. So every parameter is given a fixed slice of the
arena (`slices`): floor(density * elements) numbers, the rest of the arena on the last. What lies
in a slice follows from (seed, round, active density) and is nobody else's business.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.ops.counter_rng import MASK32, key_of
from memopt.ops.transfer import PinnedRoom
from memopt.optim.arena import Arena
from memopt.optim.parts import LeadingRows, Part
from memopt.optim.rules import StateFullRule
from memopt.optim.selections import Choice, Selection, selection_named
from memopt.optim.selections.blocks import block_order, fill_budget
from memopt.optim.selections.lowrank import LowRank, ShardedRows, Subspace
from memopt.optim.settings import Settings
from memopt.optim.tensors import Shards, local_part, matrix_shape, shards_of, share

if TYPE_CHECKING:
    from memopt.optim.capture import DeviceClock
    from memopt.optim.native import Tables

BASIS, BASIS_ROUND, COMPENSATION = "basis", "basis_round", "compensation"
NO_BASIS = -1


@dataclass(frozen=True)
class Entry:
    """One parameter: its name, its local shape as a matrix, and the selection it uses."""

    param: Tensor
    name: str
    rows: int
    columns: int
    global_size: int
    selection: Selection
    vector: bool
    tag: int  # 32 bits of the name, for the rounding's random numbers
    shards: Shards | None

    @property
    def size(self) -> int:
        """Elements on this rank."""
        return self.rows * self.columns


def make_entry(param: Tensor, name: str, settings: Settings) -> Entry:
    """Describe a parameter; parameters that are not split use coordinates of density 1."""
    rows, columns = matrix_shape(local_part(param).shape)
    kind = settings.selection if settings.split else "coordinates"
    selection, shards = selection_named(kind, param.dim()), shards_of(param)
    if shards is not None and isinstance(selection, LowRank):
        selection = ShardedRows(selection, shards.global_rows)
    return Entry(
        param, name, rows, columns, param.numel(), selection, param.dim() < 2,
        key_of("rounding", settings.seed, name) & MASK32, shards,
    )  # fmt: skip


class Bucket:
    """Arena, layout and parts of some parameters of one group.

    Args:
        entries: the parameters, in the group's order.
        settings: the group's settings when the bucket is built.
        rule: the state-full rule, which names the moments.
    """

    def __init__(self, entries: Sequence[Entry], settings: Settings, rule: StateFullRule) -> None:
        self.entries = list(entries)
        first = local_part(self.entries[0].param)
        self.device, self.dtype = first.device, first.dtype
        self.pooled = self.entries[0].selection.pooled
        quantized = settings.quantize == "8bit"
        self.density = density = settings.largest_density
        align = 256 if quantized else 1
        self.slices, capacity = self._slices(density, align)
        self.arena = Arena(
            capacity, rule.moments, dtype=self.dtype, device=self.device, quantized=quantized
        )
        self.offsets = [start for start, _ in self.slices]
        self.parts: list[Part | None] = [None] * len(self.entries)
        self.bases = self._allocate_bases(density)
        self.basis_rounds = [NO_BASIS] * len(self.entries)
        self.generation = 0  # counts changes of the layout, for caches built from it
        self.number = 0  # position among the group's buckets
        self.shown: list[dict[str, Any]] = [{} for _ in self.entries]  # their `optimizer.state`
        self._kept_templates: tuple[tuple[object, ...], list[Choice]] = ((), [])
        # Caches of the kernel's launches (memopt/optim/execute.py); they follow `generation`.
        self.refusals: dict[tuple[object, ...], str] = {}
        self.tables: dict[tuple[int, ...], Tables] = {}
        self.clocks: dict[tuple[int, ...], DeviceClock] = {}
        self.room = PinnedRoom(self.device)  # through which both are written

    # ------------------------------------------------------------------ layout
    def _budget(self, density: float, sizes: Sequence[int]) -> int:
        return share(density, sum(sizes))

    def _slices(self, density: float, align: int) -> tuple[list[tuple[int, int]], int]:
        def aligned(size: int) -> int:
            return -(-size // align) * align

        wanted = [e.selection.num_slots(e.rows, e.columns, density) for e in self.entries]
        slices, position = [], 0
        if not self.pooled:
            for size in wanted:
                slices.append((position, position + size))
                position += aligned(size)
            return slices, position
        capacity = aligned(self._budget(density, [entry.size for entry in self.entries]))
        if align > 1:  # a tensor whose size is no multiple of `align` wastes up to one block
            capacity += align * (1 + sum(entry.size % align != 0 for entry in self.entries))
        for size in wanted:
            slices.append((position, position + size // align * align))
            position = slices[-1][1]
        slices[-1] = (slices[-1][0], capacity)
        return slices, capacity

    def _allocate_bases(self, density: float) -> list[Tensor | None]:
        shapes = []
        for e in self.entries:
            kind = e.selection
            rank = kind.rank(e.rows, e.columns, density) if isinstance(kind, LowRank) else 0
            size = kind.num_basis(e.rows, e.columns, density)
            shapes.append((rank, size // rank if rank else 0))
        flat = torch.zeros(sum(a * b for a, b in shapes), dtype=self.dtype, device=self.device)
        bases, position = [], 0
        for entry, (rank, side) in zip(self.entries, shapes, strict=True):
            view = flat[position : position + rank * side].view(rank, side)
            bases.append(view if _is_low_rank(entry) else None)
            position += rank * side
        return bases

    def row_width(self, i: int) -> int:
        """Return how many numbers of state belong to each row of a parameter, 0 if none do so."""
        entry = self.entries[i]
        kind = entry.selection
        if self.arena.quantized or self.pooled:
            return 0
        if isinstance(kind, LowRank):
            return kind.rank(entry.rows, entry.columns, self.density)
        if kind.name == "columns":
            return kind.num_slots(1, entry.columns, self.density)
        return entry.columns if self.density == 1.0 else 0

    def has_rows(self, i: int) -> bool:
        """Whether a parameter's state can be cut and joined along its rows, between rounds."""
        return self.row_width(i) > 0 or self.density == 0.0

    def num_bytes(self) -> int:
        """Return the bytes of the arena and the bases."""
        bases = sum(b.numel() * b.element_size() for b in self.bases if b is not None)
        return self.arena.num_bytes() + bases

    # ------------------------------------------------------------------ parts
    def _choice(
        self, entry: Entry, settings: Settings, round_: int, density: float, grad: Tensor | None
    ) -> Choice:
        return Choice(
            seed=settings.seed, round=round_, name=entry.name, rows=entry.rows,
            columns=entry.columns, density=density, device=self.device, grad=grad,
            exact_complement=settings.complement == "exact",
        )  # fmt: skip

    def _templates(self, settings: Settings, density: float) -> list[Choice]:
        """Return every parameter's choice for some round; kept, as only the round changes."""
        key = settings.seed, density, settings.complement
        if self._kept_templates[0] != key:
            made = [self._choice(entry, settings, 0, density, None) for entry in self.entries]
            self._kept_templates = key, made
        return self._kept_templates[1]

    def plan(self, settings: Settings, round_: int, density: float) -> list[Part | None]:
        """Return the parts of a round; None where only a gradient or a stored basis can tell."""
        if self.pooled:
            return list(self._plan_blocks(settings, round_, density))
        templates = self._templates(settings, density)
        parts: list[Part | None] = [None] * len(self.entries)
        by_selection: dict[str, list[int]] = defaultdict(list)
        for i, entry in enumerate(self.entries):
            if not _is_low_rank(entry):
                by_selection[entry.selection.name].append(i)
        for members in by_selection.values():
            choices = [templates[i].in_round(round_) for i in members]
            chosen = self.entries[members[0]].selection.choose_many(choices)
            for i, part in zip(members, chosen, strict=True):
                parts[i] = part
        return parts

    def _plan_blocks(self, settings: Settings, round_: int, density: float) -> list[Part]:
        """Choose by global sizes, so that all ranks agree; take the same share of every shard."""
        sizes = [entry.global_size for entry in self.entries]
        names = [entry.name for entry in self.entries]
        budget = self._budget(density, sizes)
        sequence = block_order(
            names, sizes, budget, order=settings.order, seed=settings.seed, round_=round_
        )
        shapes = [
            (size // e.columns if e.columns else 0, e.columns)
            for e, size in zip(self.entries, sizes, strict=True)
        ]
        full_rows = fill_budget(sequence, shapes, budget)
        left = self._budget(density, [entry.size for entry in self.entries])
        parts: list[Part] = [LeadingRows(0, entry.columns) for entry in self.entries]
        for i in sequence:
            entry = self.entries[i]
            rows = full_rows[i] * entry.rows // max(1, shapes[i][0])
            rows = min(rows, left // max(1, entry.columns))  # uneven shards never overflow
            parts[i] = LeadingRows(rows, entry.columns)
            left -= rows * entry.columns
        return parts

    def _place(self, parts: Sequence[Part | None]) -> list[int]:
        if not self.pooled:
            return [start for start, _ in self.slices]
        offsets, position = [], 0
        for part in parts:
            offsets.append(position)
            assert part is not None
            position += self.arena.aligned(part.num_slots)
        assert position <= self.arena.capacity
        return offsets

    def restore(self, settings: Settings, round_: int, density: float) -> None:
        """Set the parts of a round without touching the state (first round, or after a load)."""
        parts = self.plan(settings, round_, density)
        for i, entry in enumerate(self.entries):
            if _is_low_rank(entry) and self.basis_rounds[i] != NO_BASIS:
                parts[i] = self._stored_subspace(i, settings, density)
        self.parts, self.offsets = parts, self._place(parts)
        self.generation += 1

    # ------------------------------------------------------------------ switch
    def switch(
        self, settings: Settings, round_: int, set_step: Callable[[Tensor, int], None]
    ) -> None:
        """Begin a round: choose anew, then reset or carry the moments."""
        old_parts, old_offsets = self.parts, self.offsets
        new_parts = self.plan(settings, round_, settings.current_density)
        new_offsets = self._place(new_parts)
        if settings.on_switch == "reset":
            self.arena.zero()
            for entry in self.entries:
                set_step(entry.param, 0)
        elif self.pooled:
            self._carry_blocks(old_parts, old_offsets, new_parts, new_offsets)
            for i, entry in enumerate(self.entries):
                if not _slots(old_parts[i]):
                    set_step(entry.param, 0)
        else:
            for i, (old, new) in enumerate(zip(old_parts, new_parts, strict=True)):
                if new is not None and old is not None:
                    self._carry_slot(i, old, new)
        for i, entry in enumerate(self.entries):
            if _is_low_rank(entry):
                new_parts[i] = old_parts[i]  # until its gradient is seen: `choose_basis`
        self.parts, self.offsets = new_parts, new_offsets
        self.generation += 1

    def _carry_slot(self, i: int, old: Part, new: Part) -> None:
        """Carry the moments of a parameter whose slot stays where it is."""
        start = self.slices[i][0]
        work = torch.float32 if self.arena.quantized else self.dtype
        values = self.arena.load(start, start + old.num_slots, work)
        carried = []
        for moment, value in zip(self.arena.moments, values, strict=True):
            if type(old) is type(new):
                carried.append(new.carry(old, value, signed=moment.signed))
            else:  # between all, or none, and a choice (a schedule of the density)
                carried.append(_carry_elements(self.entries[i], old, new, value))
        for name in self.arena.arrays:
            self.arena.piece(name, *self.slices[i]).zero_()
        self.arena.save(start, carried, None)

    def _carry_blocks(
        self,
        old: Sequence[Part | None],
        old_at: Sequence[int],
        new: Sequence[Part | None],
        new_at: Sequence[int],
    ) -> None:
        """Move what stays to its new place, in place.

        Both layouts have the parameters in the same order, so a range that moves left can only
        meet ranges before it and one that moves right only ranges after it: left-movers first to
        last, right-movers last to first, nothing is overwritten before it has moved.
        """
        kept = [min(_slots(a), _slots(b)) for a, b in zip(old, new, strict=True)]
        moves = [i for i, size in enumerate(kept) if size]
        left = [i for i in moves if new_at[i] < old_at[i]]
        right = [i for i in reversed(moves) if new_at[i] > old_at[i]]
        for name in self.arena.arrays:
            for i in left + right:
                source = self.arena.piece(name, old_at[i], old_at[i] + kept[i])
                target = self.arena.piece(name, new_at[i], new_at[i] + kept[i])
                overlap = abs(new_at[i] - old_at[i]) < kept[i]
                target.copy_(source.clone() if overlap else source)
            position = 0
            for i in moves:
                self.arena.piece(name, position, new_at[i]).zero_()
                position = new_at[i] + self.arena.aligned(kept[i])
                self._zero_tail(name, new_at[i] + kept[i], position)
            self.arena.piece(name, position, self.arena.capacity).zero_()

    def _zero_tail(self, name: str, start: int, stop: int) -> None:
        """Zero the codes behind a kept range in its last quantisation block."""
        if self.arena.arrays[name].numel() == self.arena.capacity:
            self.arena.arrays[name][start:stop].zero_()

    def forget(self, i: int) -> None:
        """Zero what a parameter has in this round; a subspace is chosen anew at its next gradient."""
        part, start = self.parts[i], self.offsets[i]
        if part is not None:
            stop = start + self.arena.aligned(part.num_slots)
            for name in self.arena.arrays:
                self.arena.piece(name, start, stop).zero_()
        if _is_low_rank(self.entries[i]):
            self.parts[i], self.basis_rounds[i] = None, NO_BASIS

    # ------------------------------------------------------------------ low rank
    def _stored_subspace(self, i: int, settings: Settings, density: float) -> Part:
        entry, stored = self.entries[i], self.bases[i]
        assert isinstance(entry.selection, LowRank)
        assert stored is not None
        rank = entry.selection.rank(entry.rows, entry.columns, density)
        if rank == 0:  # as `choose` says it
            return LeadingRows(0, entry.columns)
        choice = self._choice(entry, settings, 0, density, None)
        return entry.selection.part_of(stored[:rank], choice)

    def choose_basis(self, i: int, grad: Tensor | None, settings: Settings, round_: int) -> None:
        """Choose the subspace of a low-rank parameter at its first gradient of a round."""
        entry, stored, old = self.entries[i], self.bases[i], self.parts[i]
        density = settings.current_density
        choice = self._choice(entry, settings, round_, density, grad)
        new = entry.selection.choose(choice)
        self.basis_rounds[i] = round_
        if isinstance(new, LeadingRows):  # rank 0
            self.parts[i] = new
            return
        assert isinstance(new, Subspace)
        assert stored is not None
        if isinstance(old, Subspace):
            if settings.on_switch == "project":
                self._carry_slot(i, old, new)
            elif settings.on_switch == "keep" and old.num_slots != new.num_slots:
                self._keep_rank(i, old, new)
        stored[: new.basis.shape[0]].copy_(new.basis)
        self.parts[i] = self._stored_subspace(i, settings, density)

    def _keep_rank(self, i: int, old: Subspace, new: Subspace) -> None:
        """Keep the leading directions' moments when the rank has changed."""
        start, rank = self.slices[i][0], new.basis.shape[0]
        kept = []
        for value in self.arena.load(start, start + old.num_slots, torch.float32):
            wide = value.new_zeros(old.long_side, max(rank, old.basis.shape[0]))
            wide[:, : old.basis.shape[0]] = value.view(old.long_side, -1)
            kept.append(wide[:, :rank].reshape(-1))
        self.arena.save(start, kept, None)


def _carry_elements(entry: Entry, old: Part, new: Part, moment: Tensor) -> Tensor:
    """Carry what stays chosen between parts of any kind: slots are in the order of the elements."""
    every = moment.new_zeros(entry.rows, entry.columns)
    every[old.mask(entry.rows, entry.columns).to(moment.device)] = moment
    return every[new.mask(entry.rows, entry.columns).to(moment.device)]


def _slots(part: Part | None) -> int:
    return 0 if part is None else part.num_slots


def _is_low_rank(entry: Entry) -> bool:
    return entry.selection.low_rank
