"""State of sharded parameters (DTensor, FSDP2) as a checkpoint shall see it.

Each rank steps its own rows: selections depend on names, not on ranks, so columns are the same
everywhere, and blocks are chosen by global sizes; nothing is communicated. In `optimizer.state` the
state is local. `state_dict()` shows it as DTensors sharded like their parameter, or
`torch.distributed.checkpoint` would take every rank's part for a copy of the first one's: with
`columns` as (rows, chosen columns), which may be resharded to any number of ranks; otherwise as the
flat slices of all ranks, which fit the same number of ranks only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memopt.optim.bucket import Bucket


def as_sharded(bucket: Bucket, i: int, values: dict[str, Any]) -> dict[str, Any]:
    """Return one parameter's state with its tensors as DTensors; plain parameters' as it is."""
    entry = bucket.entries[i]
    if not is_sharded(entry.param):
        return values
    return {key: _wrap(value, entry.param) for key, value in values.items()}


def is_sharded(param: Tensor) -> bool:
    """Whether a parameter is a DTensor in even shards of its first dimension."""
    if not hasattr(param, "device_mesh"):
        return False
    from torch.distributed.tensor import Shard

    placements: Any = param.placements  # type: ignore[attr-defined]
    mesh: Any = param.device_mesh
    even = len(placements) == 1 and placements[0] == Shard(0) and param.shape[0] % mesh.size() == 0
    return bool(even)


def _wrap(value: Any, param: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    from torch.distributed.tensor import DTensor

    mesh: Any = param.device_mesh  # type: ignore[attr-defined]
    shape = torch.Size([value.shape[0] * mesh.size(), *value.shape[1:]])
    placements: Any = param.placements  # type: ignore[attr-defined]
    wrapped: DTensor = DTensor.from_local(
        value, mesh, placements, run_check=False, shape=shape, stride=value.stride()
    )
    return wrapped


def refuse_low_rank(param: Tensor, selection: str) -> None:
    """Raise for a subspace of a sharded matrix: its left basis would need a sum in every step."""
    if hasattr(param, "device_mesh") and param.dim() >= 2:
        raise ValueError(
            f"selection={selection!r} is not available for sharded parameters: use blocks, columns,"
            " rows or coordinates"
        )
