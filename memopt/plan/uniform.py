"""The forced plans: one placement for everything, as `plan="recompute" | "host" | "ssd" | "device"` asks.

They ignore budgets. They are the baselines that the solver must beat, and a way to see one mechanism by itself.
"""

from __future__ import annotations

from memopt.types.errors import ConfigError
from memopt.types.plan import OpPlacement, Placement, Plan, RegionPlan, check_placement
from memopt.types.trace import OpTrace, RegionTrace, StepTrace

DEFAULT_WINDOW_BYTES = 1 << 30


def uniform_plan(trace: StepTrace, placement: str) -> Plan:
    """Return the plan that uses one placement everywhere.

    Args:
        trace: the step to plan.
        placement: "recompute": every op again, region inputs on the device. "host" or "ssd": region inputs, every
            placeable op output that autograd saves (attention's in any case) and what is saved outside regions go
            there. "device": every region runs untouched.

    Raises:
        ConfigError: unknown placement, or "host" where the device is the CPU.
    """
    where = check_placement(placement)
    if where == "host" and trace.device == "cpu":
        raise ConfigError(
            "plan='host' is refused where the device is the CPU: host memory is the device's own; use 'ssd'"
        )
    if where in ("device", "recompute"):
        plain = where == "device"
        regions = tuple(RegionPlan(name=r.name, plain=plain) for r in trace.regions)
        return Plan(regions=regions, solver=f"uniform:{where}")
    regions = tuple(_moved(r, where) for r in trace.regions)
    items = [
        [r.input_nbytes, *(op.nbytes for op in plan.ops)]
        for r, plan in zip(trace.regions, regions, strict=True)
    ]
    largest = max(map(max, items), default=1)
    per_region = max(map(sum, items), default=1)
    return Plan(
        regions=regions,
        outside=where,
        window_bytes=max(1, largest, min(DEFAULT_WINDOW_BYTES, 2 * per_region)),
        prefetch_bytes=max(1, per_region),
        solver=f"uniform:{where}",
    )


def _moved(region: RegionTrace, where: Placement) -> RegionPlan:
    ops = tuple(
        OpPlacement(position=op.position, op=op.op, placement=where, nbytes=op.nbytes)
        for op in region.ops
        if _worth_moving(op)
    )
    return RegionPlan(name=region.name, input=where, ops=ops)


def _worth_moving(op: OpTrace) -> bool:
    return op.placeable and op.nbytes > 0 and (op.saved_nbytes > 0 or op.kind == "attention")
