"""Running one group's update with the implementation that fits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from memopt.optim.bucket import Bucket
from memopt.optim.group_state import COMPENSATION, STEP, GroupState
from memopt.optim.rules import StateFreeRule, StateFullRule, state_free_rule, state_full_rule
from memopt.optim.settings import Settings
from memopt.optim.stepper import CPU_TILE, DEVICE_TILE, Job, StepContext, run
from memopt.optim.tensors import local_part


def update_params(state: GroupState, params: Sequence[Tensor], impl: str) -> None:
    """Update some parameters of a group whose call is open."""
    settings = state.settings()
    full, free = state_full_rule(settings.state_full), state_free_rule(settings.state_free)
    state.move(None)
    by_bucket: dict[int, list[int]] = {}
    for param in params:
        bucket, i = state.home[param]
        by_bucket.setdefault(state.buckets.index(bucket), []).append(i)
        state.state[param][STEP] += 1
    for number, indices in by_bucket.items():
        bucket = state.buckets[number]
        state.choose_bases(bucket, indices, settings)
        _update_bucket(state, bucket, indices, (full, free), settings, impl)


def _update_bucket(
    state: GroupState,
    bucket: Bucket,
    indices: Sequence[int],
    rules: tuple[StateFullRule, StateFreeRule],
    settings: Settings,
    impl: str,
) -> None:
    context = StepContext(
        settings=settings, lr=float(settings.lr), full=rules[0], free=rules[1],
        arena=bucket.arena, call=state.group["calls"],
    )  # fmt: skip
    limit = None
    if impl != "reference":
        limit = CPU_TILE if bucket.device.type == "cpu" else DEVICE_TILE
    dense = [i for i in indices if local_part(bucket.entries[i].param).is_contiguous()]
    run([make_job(state, bucket, i) for i in dense], context, limit=limit)
    for i in set(indices) - set(dense):
        _update_strided(state, bucket, i, context, limit)


def make_job(state: GroupState, bucket: Bucket, i: int) -> Job:
    """Collect what the update of one parameter needs."""
    entry, part = bucket.entries[i], bucket.parts[i]
    assert part is not None
    assert entry.param.grad is not None
    shown = state.state[entry.param]
    return Job(
        entry=entry, part=part, offset=bucket.offsets[i], weight=local_part(entry.param),
        grad=local_part(entry.param.grad).contiguous(), step=shown[STEP],
        compensation=shown.get(COMPENSATION),
    )  # fmt: skip


def _update_strided(
    state: GroupState, bucket: Bucket, i: int, context: StepContext, limit: int | None
) -> None:
    """Update a parameter that is not contiguous through a contiguous copy."""
    job = make_job(state, bucket, i)
    copy = job.weight.contiguous()
    dense = Job(
        entry=job.entry, part=job.part, offset=job.offset, weight=copy, grad=job.grad,
        step=job.step, compensation=job.compensation,
    )  # fmt: skip
    run([dense], context, limit=limit)
    job.weight.copy_(copy)
