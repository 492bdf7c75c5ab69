"""The greedy solver: most time saved per byte first, every step checked by simulation.

What has to be chosen. Per region and op output: device, host, SSD or recompute; per region: untouched or not, and
where its input stands; per step: the window of outgoing bytes. Three resources are scarce, and each is spent where it
costs least:

- Link time that compute hides. It is there in every region's forward, so a choice made in m of n regions is spread
  evenly over them. Storing one output in some regions only is the whole-tensor form of MEMO's alpha (arXiv
  2407.12117, section 4.1), which stores a fraction of the tokens in every region.
- Device bytes over the timeline. What region i keeps stands until its backward ends, and gradients that do not exist
  yet leave room: late regions are freed first. The limits are nested (what stands at the backward of region k is what
  regions 0..k keep), so bytes are given to the latest region that still has use for them, and the last regions may
  run untouched.
- Host and SSD bytes: a cap on the sum.

Order of work: outputs by recompute time saved per byte. Each goes to host (then SSD) in as many regions as the link
hides, else to the device where room is left; a second pass lets transfers be exposed where recomputing costs more.
How many regions are untouched, how many inputs leave, and the window are searched around that, one at a time, until
none helps; then single placements are moved, swapped or raised. All counts are bounded by numbers of simulations,
never by a clock: equal inputs give equal plans.

Attention comes first by its density: nearly all of a region's time at length, in few bytes; it is recomputed where
its transfer would be exposed for longer than it runs, or where nothing else fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from memopt.plan.cost import Choice, StepModel
from memopt.plan.engine_facts import MIN_MOVE_BYTES
from memopt.plan.simulate import Settings
from memopt.plan.smallest import Candidate, Limits, evaluate
from memopt.types.plan import Placement

HIDDEN_S = 1e-9  # waits below this are rounding


@dataclass(frozen=True)
class Item:
    """One op output of one kind of region: the unit of choice."""

    index: int
    gain_s: float
    nbytes: int
    attention: bool
    regions: tuple[int, ...]


def items_of(model: StepModel) -> list[Item]:
    """Return the outputs worth storing, best first: time saved per byte, attention before others at equal worth."""
    found: list[Item] = []
    for kind in dict.fromkeys(m.kind for m in model.models):
        regions = tuple(k for k, m in enumerate(model.models) if m.kind == kind)
        first = model.models[regions[0]]
        for index, (op, gain) in enumerate(zip(first.region.ops, first.gains_s, strict=True)):
            if op.placeable and op.nbytes > 0 and gain > 0:
                attention = op.kind == "attention"
                found.append(Item(index, gain, op.nbytes, attention, regions))
    return sorted(
        found, key=lambda i: (-i.gain_s / i.nbytes, not i.attention, i.regions[0], i.index)
    )


def spread(places: Sequence[int], count: int) -> list[int]:
    """Return `count` of `places`, evenly apart."""
    return [places[(2 * j + 1) * len(places) // (2 * count)] for j in range(count)]


def placed(
    choices: Sequence[Choice], regions: Sequence[int], index: int, where: Placement
) -> list[Choice]:
    """Return `choices` with output `index` of the given regions at `where`."""
    changed = list(choices)
    for k in regions:
        ops = changed[k].ops
        changed[k] = replace(changed[k], ops=(*ops[:index], where, *ops[index + 1 :]))
    return changed


class Search:
    """The state shared by all passes: model, limits, and how many simulations were spent."""

    def __init__(self, model: StepModel, limits: Limits, max_simulations: int) -> None:
        self.model, self.limits = model, limits
        self.items = items_of(model)
        self.max_simulations = max_simulations
        self.num_simulations = 0
        self.selective = True
        self.on_cpu = model.hardware.device == "cpu"
        self.media: list[Placement] = []
        if limits.host_bytes > 0 and not self.on_cpu:
            self.media.append("host")
        if limits.ssd_bytes > 0 and model.hardware.ssd_write_bytes_per_s > 0:
            self.media.append("ssd")

    def spent(self) -> bool:
        """Whether the bound on simulations is reached."""
        return self.num_simulations >= self.max_simulations

    def may_move(self, item: Item, where: Placement) -> bool:
        """Whether the engine would take this output to host or SSD."""
        if where == "ssd" and item.nbytes > self.limits.staging_bytes:
            return False
        return item.nbytes >= MIN_MOVE_BYTES

    def evaluate(self, choices: Sequence[Choice], settings: Settings) -> Candidate | None:
        """Return the candidate if it stays inside the limits."""
        self.num_simulations += 1
        candidate = evaluate(self.model, choices, settings)
        return candidate if self.limits.hold(candidate.timeline) else None

    def fill(self, start: Candidate, *, selective: bool = True) -> Candidate:
        """Return `start` with as many outputs stored as pays, in two passes.

        `selective` spreads an output only over regions with room for its return; otherwise over all or fewer.
        """
        best, self.selective = start, selective
        for item in self.items:
            for where in (*(() if self.on_cpu else self.media), "device"):
                best = self.store(best, item, where, hidden=where != "device")
        for item in self.items:
            for where in self.media:
                best = self.store(best, item, where, hidden=False)
        return best

    def store(self, best: Candidate, item: Item, where: Placement, *, hidden: bool) -> Candidate:
        """Return `best` with `item` stored at `where` in the number of regions that serves best.

        `hidden` asks that no wait be added; otherwise the step must get shorter.
        """
        free = [
            k
            for k in item.regions
            if not best.choices[k].plain and best.choices[k].ops[item.index] == "recompute"
        ]
        if where != "device" and not (
            self.may_move(item, where) and item.nbytes <= best.settings.window_bytes
        ):
            return best
        if where != "device" and hidden:
            free = self.not_first_in_backward(best, free)
        if where == "device":
            free = self.with_room_to_stand(best, free, item)
        elif self.selective:
            free = self.with_room_to_return(best, free, item)
        if not free:
            return best
        exposed_s = best.timeline.exposed_s + HIDDEN_S

        def attempt(count: int) -> Candidate | None:
            regions = free[-count:] if where == "device" else spread(free, count)
            got = self.evaluate(placed(best.choices, regions, item.index, where), best.settings)
            if got is None or (hidden and got.timeline.exposed_s > exposed_s):
                return None
            return got

        if where == "device" or hidden:
            found = largest_count(attempt, len(free))
        else:
            found = self.steepest(attempt, len(free), best)
        if found is None or found.timeline.step_s > best.timeline.step_s:
            return best
        return found

    def not_first_in_backward(self, best: Candidate, regions: list[int]) -> list[int]:
        """Leave out the region whose recompute comes first: nothing can fetch ahead for it."""
        moved = [k for k, c in enumerate(best.choices) if not c.plain]
        return [k for k in regions if k != moved[-1]]

    def with_room_to_stand(self, best: Candidate, regions: list[int], item: Item) -> list[int]:
        """Leave out regions after whose forward, before whose backward, the device has no room for one tensor more."""
        levels, most = best.timeline.levels, self.limits.device_bytes - item.nbytes
        last = 2 * len(best.choices)
        return [k for k in regions if max(levels[k + 1 : last - k], default=0) <= most]

    def with_room_to_return(self, best: Candidate, regions: list[int], item: Item) -> list[int]:
        """Leave out regions in whose backward, or the one before, the device has no room for the fetched tensor.

        Early regions run back when all gradients exist: spreading over them too would hold the others back.
        """
        if self.on_cpu:
            return regions
        levels, most = best.timeline.levels, self.limits.device_bytes
        last = 2 * len(best.choices)  # phase of the backward of region 0
        found = []
        for k in regions:
            op = self.model.models[k].region.ops[item.index]
            ahead_fits = k + 1 == len(best.choices) or levels[last - k - 1] + op.nbytes <= most
            if ahead_fits and levels[last - k] + op.nbytes - op.saved_nbytes <= most:
                found.append(k)
        return found

    def steepest(
        self, attempt: Callable[[int], Candidate | None], count: int, best: Candidate
    ) -> Candidate | None:
        """Return the shortest step over 1..count, taking the step's length for convex in the count."""
        first = attempt(1)
        if first is None or first.timeline.step_s >= best.timeline.step_s:
            return first
        low, high = 1, count

        def step_s(m: int) -> float:
            got = attempt(m) if m else best
            return got.timeline.step_s if got is not None else float("inf")

        while low < high and not self.spent():
            middle = (low + high) // 2
            if step_s(middle + 1) < step_s(middle):
                low = middle + 1
            else:
                high = middle
        return attempt(low) if low else None


def largest_count(attempt: Callable[[int], Candidate | None], count: int) -> Candidate | None:
    """Return the attempt with the largest count that succeeds, taking success for monotone."""
    found = attempt(count)
    if found is not None:
        return found
    found = attempt(1) if count > 1 else None
    if found is None:
        return None
    low, high = 1, count
    while high - low > 1:
        middle = (low + high) // 2
        got = attempt(middle)
        if got is None:
            high = middle
        else:
            low, found = middle, got
    return found
