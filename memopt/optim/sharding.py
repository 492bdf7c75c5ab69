"""State of sharded parameters (DTensor, FSDP2) as a checkpoint shall see it.

Each rank steps its own rows: selections depend on names, not on ranks, so columns and bases are the
same everywhere, and blocks are chosen by global sizes; nothing is communicated, but for the whole
gradient that svd needs at a switch, and the norms that rules of whole matrices sum over ranks in
every step (`total_over_shards`). In `optimizer.state` the state is local. `state_dict()` shows
it as DTensors sharded like their parameter, or `torch.distributed.checkpoint` would take every rank's
part for a copy of the first one's:

- what has a row for every row of the parameter (columns; svd and random; parameters that are not
  split) may be resharded to any number of ranks;
- otherwise the flat slices of all ranks follow each other. They fit the same number of ranks only,
  which is checked, as their content would be that of other elements. Uneven shards have slices of
  uneven length; they are shown at the length of the longest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from memopt.ops import quantize as q8
from memopt.optim.arena import SCALE_SUFFIX
from memopt.optim.bucket import COMPENSATION, Bucket, Entry
from memopt.optim.rules.base import Total
from memopt.optim.tensors import local_part, shards_of, share


def as_sharded(bucket: Bucket, i: int, values: dict[str, Any]) -> dict[str, Any]:
    """Return one parameter's state with its tensors as DTensors; plain parameters' as it is."""
    entry = bucket.entries[i]
    if entry.shards is None:
        return values
    return {
        key: _wrap(bucket, i, key, value) if _has_rows_of_its_own(bucket, key, value) else value
        for key, value in values.items()
    }


def _has_rows_of_its_own(bucket: Bucket, key: str, value: Any) -> bool:
    """Whether a state's value is another on every rank: not so a basis, or a joint rule's number."""
    return isinstance(value, Tensor) and (key in bucket.arena.arrays or key == COMPENSATION)


def _wrap(bucket: Bucket, i: int, key: str, value: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    entry = bucket.entries[i]
    shards, param = entry.shards, entry.param
    assert shards is not None
    if key not in bucket.arena.arrays:  # a compensation: like the parameter
        shape = param.shape
    elif bucket.has_rows(i):
        shape = torch.Size([shards.global_rows, *value.shape[1:]])
    else:
        if not _slices_are_even(bucket, i):
            padded = value.new_zeros(_longest_slice(bucket, i, key))
            padded[: value.numel()] = value.view(-1)
            value = padded
        shape = torch.Size([value.numel() * shards.count])
    stride = torch.empty(shape, device="meta").stride()
    wrapped: DTensor = DTensor.from_local(
        value, param.device_mesh, param.placements, run_check=False, shape=shape, stride=stride,  # type: ignore[attr-defined]
    )  # fmt: skip
    return wrapped


def _longest_slice(bucket: Bucket, i: int, key: str) -> int:
    """Return a length that no rank's slice exceeds, from what all ranks know."""
    entry = bucket.entries[i]
    assert entry.shards is not None
    rows = entry.shards.largest
    size = entry.selection.num_slots(rows, entry.columns, bucket.density)
    if bucket.pooled:  # the group's remainder and alignment lie on its last slice
        entries = len(bucket.entries)
        size = share(bucket.density, rows * entry.columns) + entries
        size += bucket.arena.align * (entries + 3)
    is_scale = key.endswith(SCALE_SUFFIX) and bucket.arena.quantized
    return q8.num_blocks(size) if is_scale else size


def _slices_are_even(bucket: Bucket, i: int) -> bool:
    """Whether a parameter's slice is as long on every rank; what blocks have left is on the last."""
    entries = bucket.entries if bucket.pooled else [bucket.entries[i]]
    return all(entry.shards is None or entry.shards.even for entry in entries)


def fit_slice(bucket: Bucket, i: int, key: str, found: Tensor, view: Tensor) -> Tensor:
    """Take the padding off a slice that `as_sharded` has shown longer than it is."""
    padded = bucket.entries[i].shards is not None and not _slices_are_even(bucket, i)
    if padded and found.dim() == 1 and found.numel() == _longest_slice(bucket, i, key):
        return found[: view.numel()]
    return found


def num_shards(buckets: Iterable[Bucket]) -> int:
    """Return into how many shards the group's parameters are cut, 1 for none."""
    counts = [e.shards.count for b in buckets for e in b.entries if e.shards is not None]
    return max(counts, default=1)


def check_shards(group: dict[str, Any], buckets: list[Bucket]) -> None:
    """Refuse state of another number of shards where slices would be those of other elements.

    Raises:
        ValueError: naming both numbers.
    """
    saved, now = group["num_shards"], num_shards(buckets)
    group["num_shards"] = now
    if saved in (0, now):
        return
    dense = group["active_density"] in (0.0, group["arena_density"]) or not group["split"]
    if not dense or not all(b.has_rows(i) for b in buckets for i in range(len(b.entries))):
        raise ValueError(
            f"the state was saved on {saved} shards and is loaded on {now}: with"
            f" selection={group['selection']!r} (quantize={group['quantize']!r}) it fits the same"
            " number only; columns, svd and random without 8-bit moments can be resharded"
        )


def _groups_of_shards(param: Any) -> list[Any]:
    """Return the process groups over which a DTensor's rows are cut; replicas are in none of them."""
    mesh, placements = param.device_mesh, param.placements
    return [
        mesh.get_group(dim)
        for dim, placement in enumerate(placements)
        if placement.is_shard() and mesh.size(dim) > 1
    ]


def any_over_shards(params: Sequence[Tensor], found: bool) -> bool:
    """Return whether any rank that has rows of the same parameters has found something."""
    sharded = [param for param in params if shards_of(param) is not None]
    groups = {id(group): group for param in sharded for group in _groups_of_shards(param)}
    if not groups:
        return found
    flag = torch.tensor([float(found)], device=local_part(sharded[0]).device)
    for group in groups.values():
        torch.distributed.all_reduce(flag, group=group)
    return bool(flag.item())


def total_over_shards(entry: Entry) -> Total | None:
    """Return what sums a tensor over the ranks that have rows of a parameter; None if none do.

    The tensors are small (a number, or a number a column); replicas of a shard are not summed.
    """
    if entry.shards is None:
        return None
    groups = _groups_of_shards(entry.param)

    def total(value: Tensor) -> Tensor:
        summed = value.contiguous()
        for group in groups:
            torch.distributed.all_reduce(summed, group=group)
        return summed

    return total
