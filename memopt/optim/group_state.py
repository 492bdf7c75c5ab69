"""One parameter group at work: its clock, its buckets, and what it shows in `optimizer.state`.

The clock is in the group's dict, so that checkpoints carry it: `calls` (completed steps that had a
gradient), `round`, `last_switch` (the value of `calls` at the last switch, -1 before the first),
`active_density` (the density of the current round) and `num_shards` (on which the state was made).
A *call* opens with its first update, which switches if that is due, and is closed by `step()`;
partial steps in between belong to it.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from memopt.optim.arena import SCALE_SUFFIX
from memopt.optim.bucket import (
    BASIS,
    BASIS_ROUND,
    COMPENSATION,
    NO_BASIS,
    Bucket,
    Entry,
    make_entry,
)
from memopt.optim.rules import JointRule, state_full_rule
from memopt.optim.settings import FIXED, Settings
from memopt.optim.sharding import check_shards, fit_slice
from memopt.optim.tensors import local_part, share

CLOCK: dict[str, Any] = {
    "calls": 0,
    "round": 0,
    "last_switch": -1,
    "active_density": 0.0,
    "num_shards": 0,
}
STEP = "step"
LOW_PRECISION = (torch.bfloat16, torch.float16)
State = MutableMapping[Tensor, dict[str, Any]]


class Keys(dict[str, Any]):
    """The keys of a parameter's state that is not made yet, with values that hold nothing."""


def state_keys(group: dict[str, Any], param: Tensor) -> Keys:
    """Return which keys a parameter's state will have."""
    settings = Settings.of(group)
    low_rank = make_entry(param, "", settings).selection.low_rank
    rule, dtype = state_full_rule(settings.state_full), local_part(param).dtype
    names = [STEP]
    for moment in rule.moments:
        names.append(moment.name)
        if settings.quantize is not None:
            names.append(moment.name + SCALE_SUFFIX)
    if settings.rounding == "kahan" and dtype in LOW_PRECISION:
        names.append(COMPENSATION)
    if low_rank:
        names += [BASIS, BASIS_ROUND, *(rule.memory if isinstance(rule, JointRule) else ())]
    return Keys({name: torch.empty(0, device="meta") for name in names})


class GroupState:
    """Buckets and open call of one group.

    Args:
        group: the optimizer's group dict (held, not copied: its settings may change).
        state: the optimizer's `state`, where slices and counters are published.
        params: the parameters that get state, in the group's order.
        names: name of every parameter of the group.
    """

    def __init__(
        self,
        group: dict[str, Any],
        state: State,
        params: Iterable[Tensor],
        names: dict[Tensor, str],
    ) -> None:
        self.group, self.state = group, state
        settings = self.settings()
        rule = state_full_rule(settings.state_full)
        by_kind: dict[tuple[object, ...], list[Entry]] = defaultdict(list)
        for param in params:
            entry = make_entry(param, names[param], settings)
            local = local_part(param)
            by_kind[local.device, local.dtype, entry.selection.pooled].append(entry)
        self.buckets = [Bucket(entries, settings, rule) for entries in by_kind.values()]
        for number, bucket in enumerate(self.buckets):
            bucket.number = number
        check_shards(group, self.buckets)
        self._warn_of_blocks_without_state(settings)
        self.home = {e.param: (b, i) for b in self.buckets for i, e in enumerate(b.entries)}
        self.stepped: set[Tensor] = set()
        self._fixed = {name: group[name] for name in FIXED}
        self._last: tuple[tuple[int, ...], list[tuple[Bucket, list[int]]]] = ((), [])
        self.open = False
        self._publish()

    def _warn_of_blocks_without_state(self, settings: Settings) -> None:
        """Say where most of what blocks choose from could never have state.

        A tensor larger than the budget gives its first rows whenever it is drawn; a flat partition
        (ZeRO's) is the extreme: one tensor, whose beginning would have the state in every round.
        """
        density = settings.largest_density
        for bucket in self.buckets:
            sizes = [entry.global_size for entry in bucket.entries]
            budget = share(density, sum(sizes))
            never = sum(max(0, size - budget) for size in sizes)
            if bucket.pooled and budget and never > sum(sizes) // 2:
                warnings.warn(
                    f"selection='blocks' chooses whole tensors, up to {budget} elements here, and"
                    f" {sum(size > budget for size in sizes)} of {len(sizes)} tensors are larger"
                    f" (such as {bucket.entries[sizes.index(max(sizes))].name!r}): their first rows"
                    f" alone would have state, {never / sum(sizes):.0%} of all elements never."
                    " Use selection='columns', 'rows' or 'coordinates', or a higher density",
                    stacklevel=2,
                )

    def settings(self) -> Settings:
        """Read the group's settings as they are now."""
        return Settings.of(self.group)

    # ------------------------------------------------------------------ optimizer.state
    def _views(self, bucket: Bucket, i: int) -> dict[str, Tensor]:
        """Return the tensors of one parameter that `optimizer.state` shows."""
        views = {name: bucket.arena.piece(name, *bucket.slices[i]) for name in bucket.arena.arrays}
        if width := bucket.row_width(i):  # rows of shards can be put together and cut anew
            views = {name: view.view(-1, width) for name, view in views.items()}
        basis = bucket.bases[i]
        if basis is not None:
            views[BASIS] = basis.detach()  # an alias: what is shown may be swapped
        return views

    def _publish(self) -> None:
        """Fill `optimizer.state`; what is there already (a checkpoint, a copy) is taken over."""
        self._shown: dict[Tensor, tuple[dict[str, Any], dict[str, tuple[Tensor, int]]]] = {}
        for bucket in self.buckets:
            for i, entry in enumerate(bucket.entries):
                shown, views = self.state[entry.param], self._views(bucket, i)
                numbers, shapes = self._numbers(bucket, i), self._shapes(entry)
                if shown:
                    _check_whole(entry, shown, [*numbers, *views], shapes)
                shown.update({name: shown.get(name, value) for name, value in numbers.items()})
                if BASIS_ROUND in numbers:
                    bucket.basis_rounds[i] = int(shown[BASIS_ROUND])
                for name, (shape, dtype) in shapes.items():
                    if name not in shown:
                        shown[name] = torch.zeros(shape, dtype=dtype, device=bucket.device)
                self._take_over(bucket, i, shown, views)
                self._remember(bucket, i, shown, views)

    @staticmethod
    def _numbers(bucket: Bucket, i: int) -> dict[str, int]:
        """Return the counters of a parameter whose state is new."""
        return {STEP: 0} if bucket.bases[i] is None else {STEP: 0, BASIS_ROUND: NO_BASIS}

    def _shapes(self, entry: Entry) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Return the tensors of a parameter's state that do not lie in the arena."""
        shapes, local = {}, local_part(entry.param)
        if self.group["rounding"] == "kahan" and local.dtype in LOW_PRECISION:
            shapes[COMPENSATION] = local.shape, local.dtype
        for name in self.memory_names(entry):
            shapes[name] = torch.Size([1]), torch.float32
        return shapes

    def memory_names(self, entry: Entry) -> tuple[str, ...]:
        """Return the names of the numbers that a joint rule keeps for a parameter."""
        rule = state_full_rule(self.group["state_full"])
        return rule.memory if isinstance(rule, JointRule) and entry.selection.low_rank else ()

    def _take_over(
        self, bucket: Bucket, i: int, shown: dict[str, Any], views: dict[str, Tensor]
    ) -> None:
        entry = bucket.entries[i]
        for name, view in views.items():
            found = shown.get(name)
            if found is not None and found is not view:
                found = fit_slice(bucket, i, name, found, view)
                if found.shape != view.shape or found.dtype != view.dtype:
                    raise ValueError(
                        f"state {name!r} of {entry.name!r} is {found.dtype} {tuple(found.shape)},"
                        f" this optimizer needs {view.dtype} {tuple(view.shape)}: load a state made for"
                        " weights of the same dtype, with the same density, selection, state_full and"
                        " quantize"
                    )
                view.copy_(found)
            shown[name] = view

    def refresh(self) -> None:
        """Bring home state that another component has replaced or swapped between two steps.

        What has been deleted (`optimizer.state.clear()`) begins anew, as with torch's optimizers.
        """
        for param, (bucket, i) in self.home.items():
            shown = self.state.setdefault(param, {})
            known, views = self._shown[param]
            if shown is known and all(
                shown.get(name) is view and view.data_ptr() == pointer
                for name, (view, pointer) in views.items()
            ):
                continue
            if not shown:
                self._begin_anew(bucket, i, shown)
            home = self._views(bucket, i)
            self._take_over(bucket, i, shown, home)
            self._remember(bucket, i, shown, home)

    def _begin_anew(self, bucket: Bucket, i: int, shown: dict[str, Any]) -> None:
        """Zero a parameter's moments, wherever they lie in this round, and its counters."""
        if bucket.generation == 0:
            bucket.restore(self.settings(), self.group["round"], self.group["active_density"])
        bucket.forget(i)
        shown.update(self._numbers(bucket, i))
        for name, (shape, dtype) in self._shapes(bucket.entries[i]).items():
            shown[name] = torch.zeros(shape, dtype=dtype, device=bucket.device)

    def _remember(
        self, bucket: Bucket, i: int, shown: dict[str, Any], views: dict[str, Tensor]
    ) -> None:
        """Note what is shown, and at which addresses, so that `refresh` sees any change."""
        pointers = {name: (view, view.data_ptr()) for name, view in views.items()}
        self._shown[bucket.entries[i].param] = (shown, pointers)
        bucket.shown[i] = shown

    def names(self) -> list[str]:
        """Return the keys of a parameter's state, the same for all parameters of a bucket."""
        return sorted({key for e in self.home for key in self.state[e]})

    # ------------------------------------------------------------------ the clock
    def begin_call(self) -> None:
        """Open a call: switch if it is due."""
        if self.open:
            return
        self._refuse_changes()
        self.open = True
        self.move(None)
        self.refresh()
        settings, group = self.settings(), self.group
        if group["last_switch"] < 0:
            group.update(last_switch=group["calls"], active_density=settings.current_density)
        elif group["calls"] - group["last_switch"] >= settings.update_gap:
            self._switch(settings)
        for bucket in self.buckets:
            if bucket.generation == 0:
                bucket.restore(settings, group["round"], group["active_density"])

    def _refuse_changes(self) -> None:
        for name, value in self._fixed.items():
            if self.group[name] != value:
                raise ValueError(
                    f"{name}={self.group[name]!r} was {value!r} when the group's state was made, which"
                    " follows from it: set it back, or build a new optimizer"
                )

    def _switch(self, settings: Settings) -> None:
        group, density = self.group, settings.current_density
        for bucket in self.buckets:
            if bucket.generation == 0:
                bucket.restore(settings, group["round"], group["active_density"])
        group.update(round=group["round"] + 1, last_switch=group["calls"])
        if density == group["active_density"] and density in (0.0, 1.0) and not self._projects():
            return  # everything or nothing has state: there is nothing to switch
        group["active_density"] = density
        for bucket in self.buckets:
            bucket.switch(settings, group["round"], self._set_step)

    def _projects(self) -> bool:
        return any(entry.selection.low_rank for b in self.buckets for entry in b.entries)

    def _set_step(self, param: Tensor, step: int) -> None:
        self.state[param][STEP] = step

    def end_call(self) -> None:
        """Close the call and count it."""
        self.open = False
        self.stepped.clear()
        self.group["calls"] += 1

    # ------------------------------------------------------------------ updates
    def by_bucket(self, params: Sequence[Tensor]) -> list[tuple[Bucket, list[int]]]:
        """Sort parameters by bucket; steps mostly bring the same ones, so the last is remembered."""
        ids = tuple(map(id, params))
        if self._last[0] != ids:
            found: dict[int, list[int]] = {}
            for param in params:
                bucket, i = self.home[param]
                found.setdefault(bucket.number, []).append(i)
            self._last = ids, [(self.buckets[n], members) for n, members in found.items()]
        return self._last[1]

    def knows(self, params: Sequence[Tensor]) -> bool:
        """Whether all these parameters have their place here."""
        return self._last[0] == tuple(map(id, params)) or all(p in self.home for p in params)

    def choose_bases(self, bucket: Bucket, indices: Iterable[int], settings: Settings) -> None:
        """Choose the subspace of low-rank parameters: in the switch call, or for the first time."""
        in_switch_call = self.group["calls"] == self.group["last_switch"]
        for i in indices:
            entry = bucket.entries[i]
            if not entry.selection.low_rank:
                continue
            fresh = bucket.parts[i] is None
            if fresh or (in_switch_call and bucket.basis_rounds[i] != self.group["round"]):
                bucket.choose_basis(i, _whole_grad(entry), settings, self.group["round"])
                self.state[entry.param][BASIS_ROUND] = self.group["round"]

    def num_bytes(self) -> int:
        """Return the bytes of state: arenas, bases, compensations and joint rules' numbers."""
        total = sum(bucket.num_bytes() for bucket in self.buckets)
        for param, (bucket, i) in self.home.items():
            total += 4 * len(self.memory_names(bucket.entries[i]))
            compensation = self.state[param].get(COMPENSATION)
            if compensation is not None:
                total += compensation.numel() * compensation.element_size()
        return total

    def move(self, device: torch.device | None) -> None:
        """Move the state to a device, or (None) back beside the parameters; frees what it leaves.

        Raises:
            RuntimeError: where a CUDA graph holds its addresses.
        """
        for bucket in self.buckets:
            target = bucket.device if device is None else device
            if all(array.device == target for array in bucket.arena.arrays.values()):
                continue
            if any(clock.captured for clock in bucket.clocks.values()):
                raise RuntimeError(
                    "a captured step() reads and writes the state where it lies: it cannot be moved"
                )
            for name, array in bucket.arena.arrays.items():
                bucket.arena.arrays[name] = array.to(target)
            for i, entry in enumerate(bucket.entries):
                views, shown = self._views(bucket, i), self.state[entry.param]
                shown.update(views)
                self._remember(bucket, i, shown, views)
            bucket.generation += 1


def _check_whole(
    entry: Entry,
    shown: dict[str, Any],
    names: Iterable[str],
    shapes: dict[str, tuple[torch.Size, torch.dtype]],
) -> None:
    """Refuse a loaded state that is not all there: zeros instead would be another run, silently."""
    missing = [name for name in (*names, *shapes) if name not in shown]
    if missing:
        raise ValueError(
            f"the state of {entry.name!r} lacks {missing}: load all that state_dict() returned"
        )
    for name, (shape, dtype) in shapes.items():
        found = shown[name]
        if found.shape != shape or found.dtype != dtype:
            raise ValueError(
                f"state {name!r} of {entry.name!r} is {found.dtype} {tuple(found.shape)}, this"
                f" optimizer needs {dtype} {tuple(shape)}: load a state made for the same weights"
            )


def _whole_grad(entry: Entry) -> Tensor | None:
    """Return the gradient a basis is chosen by, as a matrix: of all ranks, where it is sharded."""
    grad = entry.param.grad
    assert grad is not None
    if not entry.selection.needs_grad:
        return None
    if entry.shards is not None:
        whole: Tensor = grad.full_tensor()  # type: ignore[attr-defined]
        return whole.reshape(-1, entry.columns)
    return local_part(grad).reshape(entry.rows, entry.columns)
