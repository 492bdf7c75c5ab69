"""The independent judge's view of one region: at every op, add up whatever is alive, O(n^2)."""

from __future__ import annotations

from memopt.types.plan import RegionPlan
from memopt.types.trace import OpTrace, RegionTrace


def is_alive(op: OpTrace, now: OpTrace) -> bool:
    """Return whether the region's own code still holds an earlier op's outputs at the birth of another's."""
    return op is now or op.freed_at is None or now.position < op.freed_at


def forward_peak(region: RegionTrace, kept: dict[int, int]) -> int:
    """Return the peak of a forward in which some bytes of some ops, by position, are kept to its end."""

    def highest(kept: dict[int, int]) -> int:
        levels = [0]
        for j, now in enumerate(region.ops):
            levels.append(0)
            for op in region.ops[: j + 1]:
                levels[-1] += op.nbytes if is_alive(op, now) else kept.get(op.position, 0)
        return max(levels)

    measured = region.forward_peak_bytes
    unseen = max(0, measured - highest({}))
    return min(highest(kept) + unseen, measured + sum(kept.values()))


def recompute_peak(region: RegionTrace, here: list[int], back: list[int]) -> int:
    """Return the peak of a recompute above the outputs that stand `here`; others are fetched `back` before it."""
    ends = max((op.position for op in region.ops if op.saved_nbytes), default=-1)
    again = [op for op in region.ops if op.position <= ends]
    early = sum(op.nbytes for op in region.ops if op.position in back)

    def highest(here: list[int], back: list[int]) -> int:
        levels = [0 if again else sum(op.nbytes for op in region.ops if op.position in back)]
        for now in again:
            level = 0
            for op in region.ops:
                born, stands = op.position <= now.position, op.position in here
                if born and op.position <= ends:
                    level += op.nbytes if is_alive(op, now) else op.saved_nbytes
                elif stands or op.position in back:
                    level += op.nbytes
                level -= op.nbytes * stands
            levels.append(level)
        return max(levels[1:] or levels)

    rehearsed = [
        sum(
            op.nbytes
            for op in again
            if op.position <= now.position and is_alive(op, now) and op.position not in here + back
        )
        for now in again
    ]
    measured = region.recompute_peak_bytes
    unseen = max(0, measured - max(0, highest([], [])))
    most = max(highest(here, back), early + max(rehearsed, default=0))
    return min(most + unseen, measured + early)


def own_backward(region: RegionTrace, entry: RegionPlan) -> int:
    """Return what a region's recompute and backward hold above what it kept."""
    where = {op.position: op.placement for op in entry.ops}
    here = [op for op in region.ops if where.get(op.position) == "device"]
    back = [op for op in region.ops if where.get(op.position) in ("host", "ssd")]
    peak, least = region.backward_peak_bytes, region.grad_nbytes
    if entry.plain:
        return max(peak - sum(op.saved_nbytes for op in region.ops), least)
    if region.recompute_peak_bytes == 0:
        more = sum(op.nbytes - op.saved_nbytes for op in back)
        return more + max(peak - sum(op.saved_nbytes for op in here), least)
    ends = max((op.position for op in region.ops if op.saved_nbytes), default=-1)
    taken = sum(op.nbytes for op in here if op.position <= ends)
    recompute = recompute_peak(region, [op.position for op in here], [op.position for op in back])
    return max(recompute, peak - taken, least)
