"""The harness of the bitwise tests: run a training program plainly and under memopt, compare every bit.

A `Program` says how a model is built and what one step does up to `optimizer.step()`. `train` runs it from a fixed
seed inside a given context and records, per step, what a user could tell two runs apart by: the outputs, every
gradient, every buffer, the random generator's state, and every parameter after the optimizer. `compare` wants all of
it equal to the last bit. The harness also refuses a run in which memopt did nothing: a context that traced no region,
or a mix that placed no op, would be trivially exact.
"""

from __future__ import annotations

import contextlib
import functools
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
SPILL = (
    ROOT / ".native" / "test-spill"
)  # in the checkout: a temporary directory may be tmpfs, which is memory
CPU_PLACEMENTS = ("recompute", "kept", "ssd", "mix-0", "mix-1")
GPU_PLACEMENTS = ("recompute", "kept", "host", "mix-0", "mix-1")


SWEEPS = (
    2,
    pytest.param(1000, marks=pytest.mark.slow),
)  # positions tried by `assert_bitwise_for_single_ops`


def some(*fast: str) -> list[Any]:
    """All CPU placements as parameters; those not named run with `-m slow` only."""
    return [p if p in fast else pytest.param(p, marks=pytest.mark.slow) for p in CPU_PLACEMENTS]


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """A training program. `step(model, i)` runs forward and backward and returns what else is to be compared."""

    build: Callable[[], nn.Module]
    step: Callable[[nn.Module, int], Any]
    regions: Any = None
    num_steps: int = 3
    seed: int = 0
    lr: float = 1e-2
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step left behind; tensors are copies."""

    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]
    buffers: dict[str, Tensor]
    params: dict[str, Tensor]
    generator: Tensor


@dataclass(kw_only=True)
class Record:
    """One run: its steps and, under memopt, the session."""

    steps: list[Step] = field(default_factory=list)
    run: Any = None
    model: nn.Module | None = None


def flat(value: Any, prefix: str = "out") -> dict[str, Tensor]:
    """Name the tensors in nested tuples, lists and dicts; copy them."""
    if isinstance(value, Tensor):
        return {prefix: value.detach().clone()}
    if isinstance(value, dict):
        items = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, (tuple, list)):
        items = [(str(i), v) for i, v in enumerate(value)]
    else:
        return {} if value is None else {prefix: torch.tensor(value)}
    return {k: t for name, v in items for k, t in flat(v, f"{prefix}.{name}").items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bytes: NaN equals itself, 0.0 differs from -0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.numel() == 0:
        return True
    a, b = a.detach().cpu().contiguous().reshape(-1), b.detach().cpu().contiguous().reshape(-1)
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names that are missing on one side or whose bits differ."""
    return sorted(
        n for n in a.keys() | b.keys() if n not in a or n not in b or not same_bits(a[n], b[n])
    )


def compare(plain: Record, other: Record, *, num_steps: int | None = None) -> None:
    """Assert that two runs left the same bits after every step (or after the first `num_steps`)."""
    num_steps = len(plain.steps) if num_steps is None else num_steps
    assert len(other.steps) == num_steps
    for i, (p, o) in enumerate(zip(plain.steps[:num_steps], other.steps, strict=True)):
        for kind in ("outputs", "grads", "buffers", "params"):
            wrong = differences(getattr(p, kind), getattr(o, kind))
            assert not wrong, (
                f"step {i}: {len(wrong)} of {len(getattr(p, kind))} {kind} differ: {wrong[:8]}"
            )
        assert torch.equal(p.generator, o.generator), (
            f"step {i}: the random generator's state differs"
        )


@contextlib.contextmanager
def spill_directory() -> Iterator[Path]:
    """A directory on the real file system; nothing may be left in it."""
    SPILL.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(dir=SPILL))
    try:
        yield path
        left = sorted(p.name for p in path.iterdir())
        assert not left, f"spill files left behind: {left}"
    finally:
        shutil.rmtree(path, ignore_errors=True)


def train(
    program: Program,
    context: Callable[[nn.Module, torch.optim.Optimizer], AbstractContextManager[Any]],
) -> Record:
    """Run the program inside `context(model, optimizer)` from its seed; the caller's generators are as before."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        return _train(program, context)


def _train(
    program: Program,
    context: Callable[[nn.Module, torch.optim.Optimizer], AbstractContextManager[Any]],
) -> Record:
    random.seed(program.seed)
    torch.manual_seed(program.seed)
    model = program.build().to(program.device).train()
    for (
        module
    ) in model.modules():  # builders may leave single modules in evaluation mode on purpose
        if getattr(module, "stay_in_eval", False):
            module.eval()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=program.lr, foreach=False)
    record = Record(model=model)
    with context(model, optimizer) as run:
        record.run = run
        for i in range(program.num_steps):
            result = program.step(model, i)
            grads = {
                n: p.grad.detach().clone()
                for n, p in model.named_parameters()
                if p.grad is not None
            }
            buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
            optimizer.step()
            after = {n: p.detach().clone() for n, p in model.named_parameters()}
            optimizer.zero_grad()
            state = (
                torch.cuda.get_rng_state() if program.device == "cuda" else torch.get_rng_state()
            )
            record.steps.append(
                Step(
                    outputs=flat(result),
                    grads=grads,
                    buffers=buffers,
                    params=after,
                    generator=state.clone(),
                )
            )
    return record


@functools.lru_cache(maxsize=64)
def plain_run(program: Program) -> Record:
    """The plain loop's record, computed once per program."""
    record = train(program, lambda model, optimizer: contextlib.nullcontext())
    record.model = None
    return record


def run_memopt(program: Program, plan: Any, **options: Any) -> Record:
    """Train under `memopt.optimize`; `options` go to it. SSD space is given where the plan may use it."""
    import memopt

    num_steps = options.pop("num_steps", None)
    if num_steps is not None:
        program = Program(**{**program.__dict__, "num_steps": num_steps})
    options.setdefault("regions", program.regions)
    with spill_directory() as path:
        options.setdefault("budget", memopt.Budget(ssd=f"{path}:1GiB"))
        return train(
            program,
            lambda model, optimizer: memopt.optimize(model, optimizer, plan=plan, **options),
        )


@functools.lru_cache(maxsize=64)
def trace_of(program: Program) -> Any:
    """The StepTrace of one step in the safest placement."""
    record = run_memopt(program, "recompute", num_steps=1)
    assert record.run.trace is not None, "no trace after the first step"
    return record.run.trace


def random_plan(
    trace: Any, seed: int, placements: tuple[str, ...] = ("device", "ssd", "recompute")
) -> Any:
    """A plan that draws a placement for every placeable op and every region input of `trace`."""
    import memopt.types.plan as types

    rng = random.Random(seed)
    inputs = tuple(p for p in placements if p != "recompute")
    regions = tuple(
        types.RegionPlan(
            name=region.name,
            input=rng.choice(inputs),
            ops=tuple(
                types.OpPlacement(
                    position=op.position,
                    op=op.op,
                    placement=rng.choice(placements),
                    nbytes=op.nbytes,
                )
                for op in region.ops
                if op.placeable
            ),
        )
        for region in trace.regions
    )
    return types.Plan(
        regions=regions,
        outside=rng.choice(inputs),
        window_bytes=rng.choice((1 << 12, 1 << 30)),
        prefetch_bytes=rng.choice((1 << 12, 1 << 30)),
    )


def every_op_plan(trace: Any, placement: str) -> Any:
    """A hand-edited plan that names every traced op, whether it may be placed or not."""
    import memopt.types.plan as types

    regions = tuple(
        types.RegionPlan(
            name=region.name,
            ops=tuple(
                types.OpPlacement(
                    position=op.position, op=op.op, placement=placement, nbytes=op.nbytes
                )
                for op in region.ops
            ),
        )
        for region in trace.regions
    )
    return types.Plan(regions=regions)


def single_op_plans(trace: Any, limit: int = 10) -> Iterator[tuple[str, Any]]:
    """For every placeable position two plans: only the op there is kept; all others are (device and SSD in turn).

    A value that is answered from storage next to one that is computed again is what breaks an engine: a random mix
    finds such a pair by luck, these plans find every pair of one op and the rest. Of more than `limit` positions as
    many are drawn, always the same.
    """
    import memopt.types.plan as types

    positions = sorted(
        {op.position for region in trace.regions for op in region.ops if op.placeable}
    )
    if len(positions) > limit:
        positions = sorted(random.Random(len(positions)).sample(positions, limit))
    for chosen in positions:
        for only in (True, False):
            regions = tuple(
                types.RegionPlan(
                    name=region.name,
                    ops=tuple(
                        types.OpPlacement(
                            position=op.position,
                            op=op.op,
                            placement="device" if only or op.position % 2 else "ssd",
                            nbytes=op.nbytes,
                        )
                        for op in region.ops
                        if op.placeable and (op.position == chosen) == only
                    ),
                )
                for region in trace.regions
            )
            yield f"{'only' if only else 'not'}-{chosen}", types.Plan(regions=regions)


def assert_bitwise_for_single_ops(program: Program, limit: int = 10) -> None:
    """Train two steps under each plan of `single_op_plans`; every one must repeat the plain loop."""
    wrong = []
    plans = list(single_op_plans(trace_of(program), limit))
    assert plans, "the trace has no placeable op"
    for name, plan in plans:
        try:
            compare(plain_run(program), run_memopt(program, plan, num_steps=2), num_steps=2)
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
    assert not wrong, f"{len(wrong)} of {len(plans)} plans\n" + "\n".join(wrong)


def kept_plan(trace: Any) -> Any:
    """Every placeable op output is stored on the device and answered from there.

    `plan="device"` leaves the regions to autograd, untouched; this plan runs the engine's two modes and recomputes
    nothing that it may store.
    """
    import memopt.types.plan as types

    regions = tuple(
        types.RegionPlan(
            name=region.name,
            ops=tuple(
                types.OpPlacement(
                    position=op.position, op=op.op, placement="device", nbytes=op.nbytes
                )
                for op in region.ops
                if op.placeable
            ),
        )
        for region in trace.regions
    )
    return types.Plan(regions=regions)


def plan_for(program: Program, placement: str) -> Any:
    """A plan's name, for "kept" `kept_plan`, for "mix-SEED" a random plan over the program's own trace."""
    if placement == "kept":
        return kept_plan(trace_of(program))
    if not placement.startswith("mix-"):
        return placement
    spill = "host" if program.device == "cuda" else "ssd"
    plan = random_plan(trace_of(program), int(placement[4:]), ("device", spill, "recompute"))
    placed = [op for region in plan.regions for op in region.ops if op.placement != "recompute"]
    assert placed, "the mix places nothing: no op of the trace is placeable"
    return plan


def assert_engaged(record: Record, placement: str) -> None:
    """Refuse a run that was exact because memopt did nothing."""
    trace = record.run.trace
    assert trace is not None and trace.regions, "memopt traced no region"
    plan = record.run.plan
    assert plan is not None, "no plan in force after the second step"
    active = [r for r in plan.regions if not r.plain]
    assert active or placement in ("recompute", "device"), (
        "every region was left plain although a placement was forced"
    )


def assert_bitwise(program: Program, placement: str, **options: Any) -> Record:
    """Train under one placement and compare with the plain loop; return the record."""
    plain = plain_run(program)  # first: a program that the plain loop refuses is no test
    record = run_memopt(program, plan_for(program, placement), **options)
    compare(plain, record)
    assert_engaged(record, placement)
    return record


def assert_bitwise_or_refused(program: Program, placement: str, **options: Any) -> Record | None:
    """The same bits, or one of memopt's own errors: never a silent difference."""
    import memopt

    plain = plain_run(program)
    try:
        record = run_memopt(program, plan_for(program, placement), **options)
    except (memopt.MemoptError, memopt.ConfigError):
        return None
    compare(plain, record)
    return record


def notes_of(run: Any) -> str:
    """All notes of a session's report in one lower-case text."""
    return "\n".join(str(n) for n in run.report().notes).lower()


class Tally:
    """A list that recomputations add to as well: memopt puts back what it can, and does not look behind `__slots__`."""

    __slots__ = ("items",)

    def __init__(self) -> None:
        self.items: list[Any] = []


class Executed(TorchDispatchMode):
    """Counts the ops that are really executed: memopt's modes lie above it and answer without it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] = self.counts.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let through warnings that a program's own libraries raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
