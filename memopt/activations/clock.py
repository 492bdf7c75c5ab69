"""Region times of a planned step, clean of waits.

The traced step is a poor clock: it digests tensors, kernels compile in it, memory is mapped in it.
So one later step is timed at region boundaries, which costs an event each, and corrects the trace.
What compute waited for transfers is taken off the phase it fell into: the planner counts waits by
itself. For that it needs the link's rate as it is beside compute, and what the step's copies took says it: waits
do not, as most of them are for a plan that asked too much of a link that ran at its full rate.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from memopt.activations.transfers import LinkDirection
from memopt.memory.meter import Meter
from memopt.types.trace import RegionTimes

MAX_CALLS = 1 << 14
"""Region calls, waits and copies that one clock marks: some loops never end the step that is timed."""

LEAST_COPIED_BYTES = 64 << 20
"""Of copies of at least 4 MiB each: fewer say little of a link of 55 GB/s."""


@dataclass(eq=False)
class _Phase:
    """One phase of one call: two marks and the waits between them."""

    begin: Any
    end: Any = None
    waits: list[tuple[Any, Any]] = field(default_factory=list)


@dataclass(eq=False)
class _Call:
    forward: _Phase
    rerun: _Phase | None = None
    backward: _Phase | None = None


class RegionClock:
    """Marks the phases of every region call of one step.

    Args:
        meter: the device's clock.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._calls: dict[str, list[_Call]] = {}
        self._phase: _Phase | None = None
        self._waits: list[tuple[Any, Any]] = []
        self._copies: dict[LinkDirection, list[tuple[int, Any, Any]]] = {"d2h": [], "h2d": []}
        self._num_forwards: Counter[str] = Counter()
        self._num_backwards: Counter[str] = Counter()
        self._room = MAX_CALLS

    @property
    def is_full(self) -> bool:
        """Whether the step was longer than what is marked: its times are of no use."""
        return self._room <= 0

    @property
    def is_whole(self) -> bool:
        """Whether every forward had its backward: none was for evaluation, none failed."""
        return all(self._num_backwards[name] >= n for name, n in self._num_forwards.items())

    @property
    def num_micro_batches(self) -> int:
        """How many times backward went through the regions; 0 where it reached none."""
        return max(
            (min(n, self._num_backwards[name]) for name, n in self._num_forwards.items()), default=0
        )

    def forward_begins(self, name: str) -> None:
        """A region's forward begins."""
        self._num_forwards[name] += 1
        self._take_room()
        phase = self._open()
        self._calls.setdefault(name, []).append(_Call(phase))

    def forward_ends(self) -> None:
        """It returned or raised."""
        self._close()

    def recompute_begins(self, name: str) -> None:
        """The backward of the region before is over; this one's recompute begins."""
        self._close()
        self._num_backwards[name] += 1
        waiting = [c for c in self._calls.get(name, ()) if c.rerun is None]
        if waiting:
            waiting[-1].rerun = self._open()

    def recompute_ends(self, name: str) -> None:
        """The recompute is complete: the rest, until another region's begins, is backward."""
        self._close()
        running = [
            c for c in self._calls.get(name, ()) if c.rerun is not None and c.backward is None
        ]
        if running:
            running[-1].backward = self._open()

    def untouched(self, name: str, output: Any) -> None:
        """A region ran untouched: where backward reaches it, that of the region behind it is over."""
        reached = False

        def reach(_: Tensor) -> None:
            nonlocal reached
            if not reached:
                reached = True
                self._num_backwards[name] += 1
                self._close()

        outputs = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
        outputs = [t for t in outputs if t.requires_grad and t.grad_fn is not None]
        for tensor in outputs:
            tensor.register_hook(reach)
        if outputs:
            self._num_forwards[name] += 1

    def backward_ends(self) -> None:
        """The step's backward is over."""
        self._close()

    def waited(self, begin: Any, end: Any) -> None:
        """Compute waited for a transfer between two marks."""
        self._take_room()
        if self.is_full:
            return
        self._waits.append((begin, end))
        if self._phase is not None:
            self._phase.waits.append((begin, end))

    def copied(self, direction: LinkDirection, nbytes: int, begin: Any, end: Any) -> None:
        """The link carried bytes between two marks."""
        self._take_room()
        if not self.is_full:
            self._copies[direction].append((nbytes, begin, end))

    def link_bytes_per_s(self, direction: LinkDirection) -> float | None:
        """Return the link's rate in the step; None where it carried too little to tell."""
        copies = self._copies[direction]
        nbytes = sum(size for size, _, _ in copies)
        seconds = sum(self._meter.seconds(begin, end) for _, begin, end in copies)
        return nbytes / seconds if nbytes >= LEAST_COPIED_BYTES and seconds > 0.0 else None

    def waited_s(self) -> float:
        """Return how long compute waited in all, inside of regions and outside."""
        return sum(self._meter.seconds(begin, end) for begin, end in self._waits)

    def times(self) -> dict[str, RegionTimes]:
        """Return the regions whose forward and backward were both seen."""
        found = {}
        for name, calls in self._calls.items():
            whole = [
                (self._seconds(c.forward), self._seconds(c.rerun), self._seconds(c.backward))
                for c in calls
                if _is_over(c.forward) and _is_over(c.rerun) and _is_over(c.backward)
            ]
            if whole:
                forward_s, rerun_s, backward_s = (
                    median(column) for column in zip(*whole, strict=True)
                )
                found[name] = RegionTimes(
                    forward_s=forward_s, rerun_s=rerun_s, backward_s=backward_s
                )
        return found

    def _take_room(self) -> None:
        self._room -= 1
        if self.is_full:
            self._calls.clear()
            self._waits.clear()
            for copies in self._copies.values():
                copies.clear()

    def _open(self) -> _Phase:
        self._phase = _Phase(self._meter.mark())
        return self._phase

    def _close(self) -> None:
        phase, self._phase = self._phase, None
        if phase is not None:
            phase.end = self._meter.mark()

    def _seconds(self, phase: _Phase | None) -> float:
        assert phase is not None
        waited = sum(self._meter.seconds(begin, end) for begin, end in phase.waits)
        return max(0.0, self._meter.seconds(phase.begin, phase.end) - waited)


def _is_over(phase: _Phase | None) -> bool:
    """Whether a phase was marked at both ends: another one's begin may have cut it off."""
    return phase is not None and phase.end is not None
