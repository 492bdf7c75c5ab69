"""What one region holds while it runs, op by op: the peak moves with what a plan keeps.

A trace knows when each op's outputs are born and when the region's own code lets go of them (`freed_at`). What a plan
keeps of them changes only how long they last, so the bytes at every op of the forward and of the recompute follow from
one traced step. What the measured peaks hold beyond the sum of the outputs (workspaces of kernels, which are
allocated and freed inside one op) is added wherever the peak is.

- Forward: an output lasts until it is freed, one that is kept until the forward ends.
- Recompute: an output lasts until it is freed, as far as autograd saves it until the recompute ends. One that stands
  on the device goes the same way: it is handed over, and stands no longer than the code needs it or autograd saves
  it. What is fetched is there from the begin. A plan's first step may rehearse a recompute (activations/skips.py):
  then what is stored stays, and what is run again lasts until it is freed.

Where a trace does not say when an output is freed it counts to the end, and no peak is above the measured one by more
than what is kept, or fetched: that bounds what a trace of less detail makes of it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from memopt.types.trace import RegionTrace


class Inside:
    """Levels of one region, above its start, with nothing kept.

    Args:
        region: its ops in order, with what was measured of them together.
    """

    def __init__(self, region: RegionTrace) -> None:
        ops = region.ops
        self.nbytes = [op.nbytes for op in ops]
        self.saved = [op.saved_nbytes for op in ops]
        positions = [op.position for op in ops]
        self._freed = [
            len(ops) if op.freed_at is None else max(k + 1, bisect_left(positions, op.freed_at))
            for k, op in enumerate(ops)
        ]
        """Per op, the first later one at whose birth its outputs are gone."""
        self.num_rerun = 1 + max((k for k, n in enumerate(self.saved) if n > 0), default=-1)
        """Ops that a recompute runs: it ends with the last output that autograd saves."""
        self._forward = self._levels([0] * len(ops))
        self._recompute = self._levels(self.saved)[: self.num_rerun]
        self._forward_peak = region.forward_peak_bytes
        self._recompute_peak = region.recompute_peak_bytes
        self._forward_extra = max(0, self._forward_peak - max(self._forward, default=0))
        self._recompute_extra = max(0, self._recompute_peak - max(self._recompute, default=0))

    def _levels(self, lasting: Sequence[int]) -> list[int]:
        """Return the bytes at each op's birth, of which `lasting` ones are never freed."""
        change = [0] * (len(self.nbytes) + 1)
        for k, (nbytes, left, gone) in enumerate(
            zip(self.nbytes, lasting, self._freed, strict=True)
        ):
            change[k] += nbytes
            change[gone] -= nbytes - left
        return list(accumulate(change[:-1]))

    def forward_bytes(self, kept: Sequence[int]) -> int:
        """Return the peak above the forward's start where `kept` bytes of each op's outputs stay."""
        change = [0] * (len(kept) + 1)
        for nbytes, gone in zip(kept, self._freed, strict=True):
            change[gone] += nbytes
        highest = _highest(self._forward, change)
        return min(highest + self._forward_extra, self._forward_peak + sum(kept))

    def recompute_bytes(self, standing: Sequence[int], fetched: Sequence[int]) -> int:
        """Return the peak above what stands at the recompute's start.

        Args:
            standing: indices of the ops whose outputs are on the device.
            fetched: of those whose outputs come back from elsewhere.
        """
        change = [0] * (len(self.nbytes) + 1)
        for k in standing:
            change[k] -= self.nbytes[k]
        early = 0
        for k in fetched:
            early += self.nbytes[k]
            change[k] -= self.nbytes[k]
        change[0] += early
        if not self._recompute:
            return self._recompute_peak + early
        highest = max(
            _highest(self._recompute, change), early + self._rehearsed({*standing, *fetched})
        )
        return min(highest + self._recompute_extra, self._recompute_peak + early)

    def _rehearsed(self, kept: set[int]) -> int:
        """Return the peak of a run that keeps nothing and lets go of nothing that is stored."""
        change = [0] * (len(self.nbytes) + 1)
        for k in kept:
            change[k] -= self.nbytes[k]
            change[self._freed[k]] += self.nbytes[k]
        return _highest(self._forward[: self.num_rerun], change)


def _highest(levels: Sequence[int], change: Sequence[int]) -> int:
    """Return the largest level where each one and all later ones are changed."""
    return max(map(int.__add__, levels, accumulate(change)), default=0)


def own_facts(r: RegionTrace) -> tuple[object, ...]:
    """Return what a region need not share with its kind, times left out."""
    peaks = (r.forward_peak_bytes, r.recompute_peak_bytes, r.backward_peak_bytes, r.entry_nbytes)
    sizes = (
        r.input_saved_nbytes,
        r.input_outside_nbytes,
        r.cast_nbytes,
        r.cached_nbytes,
        r.around_nbytes,
    )
    return (*peaks, *sizes, *((op.rewritten, op.freed_at) for op in r.ops))
