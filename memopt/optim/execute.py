"""Running one group's update with the implementation that fits."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from memopt.ops import frugal_step as op
from memopt.ops.native import cuda_status
from memopt.optim import native
from memopt.optim.bucket import COMPENSATION, Bucket
from memopt.optim.capture import DeviceClock
from memopt.optim.group_state import STEP, GroupState
from memopt.optim.rules import StateFreeRule, StateFullRule, state_free_rule, state_full_rule
from memopt.optim.settings import Settings
from memopt.optim.stepper import CPU_TILE, DEVICE_TILE, Job, StepContext, call_tag, run
from memopt.optim.tensors import local_part
from memopt.types.errors import NativeUnavailable


def is_capturing() -> bool:
    """Whether the current CUDA stream is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def update_params(state: GroupState, params: Sequence[Tensor], impl: str) -> None:
    """Update some parameters of a group whose call is open."""
    settings = state.settings()
    rules = state_full_rule(settings.state_full), state_free_rule(settings.state_free)
    capturing = is_capturing()
    for bucket, indices in state.by_bucket(params):
        _refuse_moved(bucket, indices)
        state.choose_bases(bucket, indices, settings)
        reason = why_not_native(bucket, settings, rules) if impl in ("auto", "native") else impl
        if reason and (impl == "native" or settings.capturable):
            raise NativeUnavailable(
                f"impl='native' (or capturable=True) was asked for, but {reason}"
            )
        if not capturing:  # the host's counters are those of `begin_step` then
            for i in indices:
                bucket.shown[i][STEP] += 1
        if reason:
            _update_in_torch(state, bucket, indices, rules, settings, impl)
        else:
            _update_natively(state, bucket, indices, rules, settings)


def _refuse_moved(bucket: Bucket, indices: Sequence[int]) -> None:
    """Refuse weights that were cast, moved (`model.to(...)`) or resized after their state was made."""
    entries, dtype, device = bucket.entries, bucket.dtype, bucket.device
    for i in indices:
        param = entries[i].param
        if param.dtype is not dtype or param.device != device:
            raise ValueError(
                f"{entries[i].name!r} is {param.dtype} on {param.device}, its state was made for"
                f" {bucket.dtype} on {bucket.device}: cast and move the model before the first step;"
                " after a move, optimizer.load_state_dict(optimizer.state_dict()) brings the state along"
            )
        if param.numel() != entries[i].global_size:  # a kernel would write beyond it
            raise ValueError(
                f"{entries[i].name!r} has {param.numel()} elements, its state was made for"
                f" {entries[i].global_size}: build a new optimizer after changing a parameter's shape"
            )


def why_not_native(
    bucket: Bucket, settings: Settings, rules: tuple[StateFullRule, StateFreeRule]
) -> str:
    """Return why a bucket is not stepped by the kernel; empty if it is. Cached with the bucket."""
    key = (
        settings.selection, settings.quantize, settings.split, settings.current_density,
        rules[0].name, rules[1].name,
    )  # fmt: skip
    if bucket.refusals.get(key) is None:
        bucket.refusals[key] = native.refusal(bucket, settings, *rules)
        _tell_of_missing_kernels(bucket.device.type, bucket.refusals[key])
    return bucket.refusals[key]


def _tell_of_missing_kernels(device: str, reason: str) -> None:
    """Warn where impl='auto' would take the kernel and cannot have it: that costs most of the speed."""
    if device == "cuda" and reason and reason == cuda_status().reason:
        warnings.warn(
            f"Frugal steps with PyTorch's operations, several times slower than its kernel; {reason}."
            " impl='foreach' asks for it",
            stacklevel=2,
        )


# ------------------------------------------------------------------------------- PyTorch
def _update_in_torch(
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
    jobs: list[Job] = []
    strided: list[Job] = []
    for i in indices:
        job = _make_job(state, bucket, i)
        (jobs if job.weight.is_contiguous() else strided).append(job)
    run(jobs, context, limit=limit)
    for job in strided:  # through a contiguous copy
        copy = job.weight.contiguous()
        run([dataclasses.replace(job, weight=copy)], context, limit=limit)
        job.weight.copy_(copy)


def _make_job(state: GroupState, bucket: Bucket, i: int) -> Job:
    """Collect what the update of one parameter needs."""
    entry, part = bucket.entries[i], bucket.parts[i]
    assert part is not None
    assert entry.param.grad is not None
    shown = bucket.shown[i]
    return Job(
        entry=entry, part=part, offset=bucket.offsets[i], weight=local_part(entry.param),
        grad=local_part(entry.param.grad).contiguous(), step=shown[STEP],
        compensation=shown.get(COMPENSATION),
        memory={name: shown[name] for name in state.memory_names(entry)},
    )  # fmt: skip


# ------------------------------------------------------------------------------- kernel
def _update_natively(
    state: GroupState,
    bucket: Bucket,
    indices: Sequence[int],
    rules: tuple[StateFullRule, StateFreeRule],
    settings: Settings,
) -> None:
    op.register()
    weights = [local_part(bucket.entries[i].param) for i in indices]
    if not all(weight.is_contiguous() for weight in weights):
        strided = [i for i, w in zip(indices, weights, strict=True) if not w.is_contiguous()]
        if is_capturing():
            raise ValueError("capturable=True needs contiguous parameters")
        _update_in_torch(state, bucket, strided, rules, settings, "foreach")
        indices = [i for i in indices if i not in strided]
        weights = [w for w in weights if w.is_contiguous()]
    if not indices:
        return
    for first in range(0, len(indices), op.MAX_TENSORS):  # what one launch takes
        run = slice(first, first + op.MAX_TENSORS)
        _launch(state, bucket, indices[run], weights[run], rules, settings)


def _launch(
    state: GroupState,
    bucket: Bucket,
    indices: Sequence[int],
    weights: Sequence[Tensor],
    rules: tuple[StateFullRule, StateFreeRule],
    settings: Settings,
) -> None:
    grads = [_matching_grad(bucket.entries[i].param, bucket.dtype) for i in indices]
    shown = [bucket.shown[i] for i in indices]
    tables = tables_for(bucket, indices, settings)
    lr = 0.0 if settings.capturable else float(settings.lr)
    steps = [max(1, values[STEP]) for values in shown]
    sizes, scales = native.corrections(steps, settings, rules[0], lr)
    scalars = _tick(state, bucket, tables, settings, rules[0]) if settings.capturable else None
    torch.ops.memopt.frugal_step(
        weights, grads, list(bucket.arena.arrays.values()),
        [values[COMPENSATION] for values in shown if COMPENSATION in values],
        tables.segments, tables.chunks, tables.index, sizes, scales,
        native.numbers_of(settings, lr),
        native.choices_of(settings, *rules, call_tag(settings.seed, state.group["calls"])),
        scalars,
    )  # fmt: skip


def _matching_grad(param: Tensor, dtype: torch.dtype) -> Tensor:
    assert param.grad is not None
    grad = local_part(param.grad)
    if grad.dtype == dtype and grad.is_contiguous():
        return grad
    return grad.to(dtype).contiguous()


def tables_for(bucket: Bucket, indices: Sequence[int], settings: Settings) -> native.Tables:
    """Return the kernel's tables for some parameters, filled for the current layout."""
    key = tuple(indices)
    tables = bucket.tables.get(key)
    if is_capturing() and (tables is None or tables.generation != bucket.generation):
        raise RuntimeError(
            "a step is being captured that was not run before: step the same parameters eagerly once,"
            " with capturable=True, then capture"
        )
    if tables is None:
        _make_room(bucket, indices)
        tables = bucket.tables[key] = native.make_tables(bucket, indices, split=settings.split)
    native.fill_tables(tables, bucket)
    return tables


def _make_room(bucket: Bucket, indices: Sequence[int]) -> None:
    """Drop the oldest tables where all would outgrow those of four whole steps.

    Which parameters have gradients may differ in every step (experts).
    """
    room = 4 * native.max_chunks(bucket, range(len(bucket.entries)))
    room -= native.max_chunks(bucket, indices)
    kept = 0
    for key in reversed(list(bucket.tables)):
        kept += bucket.tables[key].chunks.numel()
        clock = bucket.clocks.get(key)
        if kept > room and not (clock is not None and clock.captured):  # a graph reads its own
            del bucket.tables[key]
            bucket.clocks.pop(key, None)


def _tick(
    state: GroupState,
    bucket: Bucket,
    tables: native.Tables,
    settings: Settings,
    full: StateFullRule,
) -> Tensor:
    clock = bucket.clocks.get(tables.indices)
    if clock is None:
        clock = bucket.clocks[tables.indices] = DeviceClock(len(tables.indices), bucket.room)
    if is_capturing():
        _note_capture(bucket, tables.indices)
    else:
        set_clock(state, bucket, tables.indices, clock, updates_done=-1)
    clock.tick(settings, full)
    return clock.scalars


def _note_capture(bucket: Bucket, indices: tuple[int, ...]) -> None:
    """Remember whose counters a graph advances; the last graph that steps a parameter counts."""
    for others, clock in bucket.clocks.items():
        if others == indices:
            clock.captured = True
        elif clock.captured and not set(others).isdisjoint(indices):
            clock.captured = False


def set_clock(
    state: GroupState, bucket: Bucket, indices: Sequence[int], clock: DeviceClock, updates_done: int
) -> None:
    """Write the host's counters to the device, for a step that `updates_done` (0, -1) counted."""
    steps = [bucket.shown[i][STEP] + updates_done for i in indices]
    clock.set(state.group["lr"], steps, state.group["calls"])


def begin_replay(state: GroupState) -> bool:
    """Do the host's part of a step that a CUDA graph is about to replay: switch, counters, tables.

    Returns False, and does nothing, if no graph has captured a step of this group.
    """
    captured = [
        (bucket, indices, clock)
        for bucket in state.buckets
        for indices, clock in bucket.clocks.items()
        if clock.captured
    ]
    if not captured:
        return False
    state.begin_call()
    for bucket, indices, clock in captured:
        native.fill_tables(bucket.tables[indices], bucket)
        set_clock(state, bucket, indices, clock, updates_done=0)
        for i in indices:
            bucket.shown[i][STEP] += 1
    state.end_call()
    return True
