"""An independent judge of plans: shares no code with the cost model, the simulation or the solvers.

It is written from `docs/plan.md` in the plainest way: every tensor becomes a lifetime (first phase, last phase,
bytes), every transfer a (begin, end), and each phase adds up whatever is alive, O(n^2). Where it and the solver
disagree, one of the two is wrong. What happens inside one region is in `validate_inside`.

Phases: 0..n-1 forward of each region, n turning point, n+1..2n backward of regions n-1..0, 2n+1 end of backward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

from memopt.plan import engine_facts
from memopt.plan.validate_inside import forward_peak, own_backward
from memopt.types.hardware import Hardware
from memopt.types.plan import Plan, RegionPlan
from memopt.types.trace import RegionTrace, StepTrace

PAGE = 4096


def check(
    trace: StepTrace,
    plan: Plan,
    hardware: Hardware,
    *,
    device_bytes: int,
    host_bytes: int,
    ssd_bytes: int,
    staging_bytes: int = 0,
) -> list[str]:
    """Return what is wrong with `plan`; an empty list where nothing is.

    Args:
        trace: the step that the plan is for.
        plan: the plan.
        hardware: rates of the machine that runs it.
        device_bytes: what the device peak may reach, slack already taken off.
        host_bytes: what the host peak may reach.
        ssd_bytes: what the SSD peak may reach.
        staging_bytes: size of the buffers in front of the SSD.
    """
    found = illegal_entries(trace, plan)
    if found:
        return found
    replay = Replay(trace, plan, hardware, staging_bytes)
    replay.run()
    limits = {"device": device_bytes, "host": host_bytes, "ssd": ssd_bytes}
    used = {
        "device": max(replay.device_levels()),
        "host": replay.host_bytes,
        "ssd": replay.ssd_bytes,
    }
    return [
        f"{where}: {used[where]} bytes of {limits[where]}"
        for where in limits
        if used[where] > limits[where]
    ]


def illegal_entries(trace: StepTrace, plan: Plan) -> list[str]:
    """Return the entries of a plan that no machine could run."""
    found = []
    regions = {r.name: r for r in trace.regions}
    for entry in plan.regions:
        if entry.name not in regions:
            found.append(f"{entry.name}: no such region")
            continue
        ops = {op.position: op for op in regions[entry.name].ops}
        if len({op.position for op in entry.ops}) < len(entry.ops):
            found.append(f"{entry.name}: an op is placed twice")
        if trace.device == "cpu" and "host" in (entry.input, *(op.placement for op in entry.ops)):
            found.append(f"{entry.name}: host placement on the CPU")
        for placed in entry.ops:
            if placed.placement == "recompute":
                continue
            op = ops.get(placed.position)
            if op is None or op.op != placed.op or op.nbytes != placed.nbytes:
                found.append(
                    f"{entry.name}: no op {placed.op} of {placed.nbytes} bytes at {placed.position}"
                )
            elif not op.placeable:
                found.append(
                    f"{entry.name}: {op.op} at {op.position} may not be placed: {op.reason}"
                )
    if trace.device == "cpu" and plan.outside == "host":
        found.append("outside: host placement on the CPU")
    return found


@dataclass
class Replay:
    """A step replayed tensor by tensor."""

    trace: StepTrace
    plan: Plan
    hardware: Hardware
    staging_bytes: int = 0
    lifetimes: list[tuple[int, int, int]] = field(default_factory=list)
    leaving: list[tuple[float, int]] = field(default_factory=list)
    came: dict[int, float] = field(default_factory=dict)
    ready_early: dict[int, float] = field(default_factory=dict)
    drained_at: int | None = None
    host_bytes: int = 0
    ssd_bytes: int = 0
    now: float = 0.0
    link_out: float = 0.0
    link_in: float = 0.0
    disk_out: float = 0.0
    disk_in: float = 0.0

    def run(self) -> None:
        """Fill `lifetimes` and `leaving`."""
        for k, region in enumerate(self.trace.regions):
            self.forward(k, region, self.entry(region))
        self.turning_point()
        for k in reversed(range(len(self.trace.regions))):
            self.backward(k, self.trace.regions[k], self.entry(self.trace.regions[k]))
        last = 2 * len(self.trace.regions) + 1
        self.alive(last, last, self.trace.regions[0].input_nbytes)
        self.states()
        self.rooms()

    def entry(self, region: RegionTrace) -> RegionPlan:
        """Return the plan's entry of a region."""
        return next(
            (r for r in self.plan.regions if r.name == region.name), RegionPlan(name=region.name)
        )

    def alive(self, first: int, last: int, nbytes: int) -> None:
        """Note a lifetime, both ends included."""
        self.lifetimes.append((first, last, nbytes))

    def moved(self, region: RegionTrace, entry: RegionPlan) -> list[tuple[int, bool, float]]:
        """Return (bytes, to SSD, seconds after the region's start) of all that leaves, in order."""
        if entry.plain:
            return []
        by_position = {op.position: op.placement for op in entry.ops}
        alike = [r for r in self.trace.regions if same_shapes(r, region)]
        times = [median(r.ops[j].time_s for r in alike) for j in range(len(region.ops))]
        scale = min(1.0, median(r.forward_s for r in alike) / sum(times)) if sum(times) > 0 else 0.0
        found = (
            [(region.input_nbytes, entry.input == "ssd", 0.0)] if entry.input != "device" else []
        )
        for j, op in enumerate(region.ops):
            where = by_position.get(op.position, "recompute")
            if where in ("host", "ssd"):
                found.append((op.nbytes, where == "ssd", sum(times[: j + 1]) * scale))
        return found

    def forward(self, k: int, region: RegionTrace, entry: RegionPlan) -> None:
        """Phase k."""
        start, waits = self.now, 0.0
        for nbytes, to_ssd, offset in self.moved(region, entry):
            self.now = max(self.now, start + offset + waits)
            before = self.now
            self.make_room(nbytes)
            if self.trace.device == "cpu":
                self.now += nbytes / self.hardware.d2h_bytes_per_s
            self.came[k] = self.send(nbytes, to_ssd)
            waits += self.now - before
        self.now = start + waits + self.typical(region, "forward_s")
        self.forward_lifetimes(k, region, entry)

    def make_room(self, nbytes: int) -> None:
        """Wait until the window takes `nbytes` more: the oldest first."""
        waiting = [(end, size) for end, size in self.leaving if (end, size) not in self.gone()]
        while waiting and sum(size for _, size in waiting) + nbytes > self.plan.window_bytes:
            self.now = max(self.now, waiting.pop(0)[0])

    def gone(self) -> list[tuple[float, int]]:
        """Return what left the window: everything before the first transfer that has not ended by now."""
        found: list[tuple[float, int]] = []
        for end, size in self.leaving:
            if end > self.now:
                break
            found.append((end, size))
        return found

    def send(self, nbytes: int, to_ssd: bool) -> float:
        """Queue a transfer out and return its end."""
        end = self.now
        if self.trace.device != "cpu":
            end = self.link_out = max(self.link_out, end) + nbytes / self.hardware.d2h_bytes_per_s
        if to_ssd:
            end = self.disk_out = (
                max(self.disk_out, end) + nbytes / self.hardware.ssd_write_bytes_per_s
            )
        self.leaving.append((end, nbytes))
        return end

    def forward_lifetimes(self, k: int, region: RegionTrace, entry: RegionPlan) -> None:
        """Everything that region k brings into its forward, and what of it stays until its backward."""
        n = len(self.trace.regions)
        until = 2 * n - k
        stored = {op.position for op in entry.ops if op.placement == "device"}
        kept = {
            op.position: op.saved_nbytes if entry.plain else op.nbytes
            for op in region.ops
            if entry.plain or op.position in stored
        }
        saved_in = region.input_nbytes
        hidden = region.saved_nbytes - saved_in - sum(op.saved_nbytes for op in region.ops)
        if region.input_saved_nbytes is not None:
            hidden += saved_in - region.input_saved_nbytes
            saved_in = region.input_saved_nbytes
        if not entry.plain:
            hidden, saved_in = 0, region.input_nbytes if entry.input == "device" else 0
        kept_in = max(saved_in, region.input_outside_nbytes)
        there = min(kept_in, self.handed_on(k))
        self.alive(k, k, region.input_nbytes)
        self.alive(k, k, -there)
        self.alive(k, k, forward_peak(region, kept))
        self.alive(k, until, max(0, hidden))
        # the region's own levels hold what it keeps of its ops
        self.alive(k + 1, until, kept_in - there + sum(kept.values()))
        self.alive(k + 1, n, region.cached_nbytes if entry.plain else region.cast_nbytes)
        self.alive(k, n, region.around_nbytes)
        self.alive(k, until, region.beside_nbytes if self.plan.outside == "device" else 0)

    def handed_on(self, k: int) -> int:
        """Return what the region before k keeps on the device of the output that is k's input."""
        if k == 0:
            return 0
        before, position = self.trace.regions[k - 1], self.trace.regions[k].input_op
        entry = self.entry(before)
        made = [op for op in before.ops if op.position == position]
        if entry.plain:
            return sum(op.saved_nbytes for op in made)
        kept = [op.position for op in entry.ops if op.placement == "device"]
        return sum(op.nbytes for op in made if op.position in kept and not op.rewritten)

    def turning_point(self) -> None:
        """Phase n."""
        trace, n = self.trace, len(self.trace.regions)
        inside = sum(r.forward_s + r.recompute_s + r.backward_s for r in trace.regions)
        self.now += max(
            0.0, (trace.forward_s + trace.backward_s) / max(1, trace.num_micro_batches) - inside
        )
        nbytes, rates = trace.outside_saved_bytes, self.hardware
        if self.plan.outside != "device":
            self.now += nbytes / rates.d2h_bytes_per_s + nbytes / rates.h2d_bytes_per_s
        if self.plan.outside == "ssd":
            self.now += nbytes / rates.ssd_write_bytes_per_s + nbytes / rates.ssd_read_bytes_per_s
        self.alive(n, n, trace.outside_peak_bytes + self.output_bytes())

    def output_bytes(self) -> int:
        """Return the bytes of the last region's output."""
        last = self.trace.regions[-1]
        return last.ops[-1].nbytes if last.ops else last.input_nbytes

    def backward(self, k: int, region: RegionTrace, entry: RegionPlan) -> None:
        """Phase 2n - k."""
        n = len(self.trace.regions)
        phase = 2 * n - k
        self.alive(phase, phase, region.entry_nbytes + own_backward(region, entry))
        self.alive(
            phase,
            phase,
            self.trace.regions[k + 1].input_nbytes if k + 1 < n else self.output_bytes(),
        )
        if not entry.plain:
            self.alive(phase, phase, region.input_nbytes if entry.input != "device" else 0)
            self.rerun(k, region, entry)
        self.now += self.typical(region, "backward_s")

    def rerun(self, k: int, region: RegionTrace, entry: RegionPlan) -> None:
        """The recompute of region k, with its fetches and those for the region below."""
        n = len(self.trace.regions)
        moved = self.moved(region, entry)
        if engine_facts.DRAINS_BEFORE_BACKWARD and self.drained_at is None:
            self.drained_at = 2 * n - k
            if self.trace.device != "cpu":
                self.now = max(self.now, self.link_out)
        above = [j for j in range(k + 1, n) if not self.entry(self.trace.regions[j]).plain]
        early = self.early(moved) if above else 0
        ready = self.ready_early.get(k, 0.0) if above else 0.0
        for nbytes, from_ssd, _ in moved[early:]:
            ready = self.fetch(nbytes, from_ssd, self.came[k])
        below = [j for j in range(k) if not self.entry(self.trace.regions[j]).plain]
        if below:
            j = below[-1]
            other = self.moved(self.trace.regions[j], self.entry(self.trace.regions[j]))
            for nbytes, from_ssd, _ in other[: self.early(other)]:
                self.ready_early[j] = self.fetch(nbytes, from_ssd, self.came[j])
                if self.trace.device != "cpu":
                    self.alive(2 * n - k, 2 * n - j - 1, nbytes)
        self.now = max(self.now, ready)
        if self.trace.device == "cpu":
            self.now += sum(nbytes for nbytes, _, _ in moved) / self.hardware.h2d_bytes_per_s
        self.now += self.remaining_s(region, entry)

    def early(self, moved: list[tuple[int, bool, float]]) -> int:
        """Return how many of these are fetched before their own region starts."""
        sizes = [nbytes for nbytes, _, _ in moved]
        return max(
            c for c in range(len(sizes) + 1) if c == 0 or sum(sizes[:c]) <= self.plan.prefetch_bytes
        )

    def fetch(self, nbytes: int, from_ssd: bool, arrived: float) -> float:
        """Queue a transfer back and return its end."""
        end = max(self.now, arrived)
        if from_ssd:
            end = self.disk_in = (
                max(self.disk_in, end) + nbytes / self.hardware.ssd_read_bytes_per_s
            )
        if self.trace.device != "cpu":
            end = self.link_in = max(self.link_in, end) + nbytes / self.hardware.h2d_bytes_per_s
        return end

    def remaining_s(self, region: RegionTrace, entry: RegionPlan) -> float:
        """Return the recompute that is left of a region."""
        stored = {op.position for op in entry.ops if op.placement != "recompute"}
        alike = [r for r in self.trace.regions if same_shapes(r, region)]
        ends = max((op.position for op in region.ops if op.saved_nbytes), default=-1)
        again = {j: op.position for j, op in enumerate(region.ops) if op.position <= ends}
        times = {j: median(r.ops[j].time_s for r in alike) for j in again}
        whole = self.typical(region, "recompute_s")
        scale = min(1.0, whole / sum(times.values())) if sum(times.values()) > 0 else 0.0
        return max(
            0.0,
            whole - scale * sum(times[j] for j, position in again.items() if position in stored),
        )

    def typical(self, region: RegionTrace, name: str) -> float:
        """Return the median of a time over the regions of the same shapes."""
        return median(float(getattr(r, name)) for r in self.trace.regions if same_shapes(r, region))

    def states(self) -> None:
        """Lifetimes of what is there whatever the plan says, and of the gradients."""
        trace, n = self.trace, len(self.trace.regions)
        end = 2 * n + 1
        states = (
            trace.param_bytes
            + trace.buffer_bytes
            + trace.optimizer_bytes
            + trace.grad_bytes_at_start
        )
        self.alive(0, end, max(trace.resident_bytes, states))
        outside = trace.outside_saved_bytes
        if trace.peak_bytes > 0:
            peaks = [trace.outside_peak_bytes, *(r.backward_peak_bytes for r in trace.regions)]
            peaks += [r.recompute_peak_bytes for r in trace.regions]
            at_start = trace.resident_bytes - trace.optimizer_bytes
            outside = max(0, min(outside, trace.peak_bytes - at_start - max(peaks)))
        if trace.outside_standing_bytes is not None:
            outside = trace.outside_standing_bytes
        outside = max(0, outside - sum(r.beside_nbytes for r in trace.regions))
        self.alive(0, end, outside if self.plan.outside == "device" else 0)
        new = (
            0.0
            if trace.grad_bytes <= 0
            else max(0.0, 1.0 - trace.grad_bytes_at_start / trace.grad_bytes)
        )
        own = [int(r.grad_nbytes * new) for r in trace.regions]
        self.alive(n + 1, end, max(0, int(trace.grad_bytes * new) - sum(own)))
        for k, nbytes in enumerate(own):
            self.alive(2 * n - k + 1, end, nbytes)

    def rooms(self) -> None:
        """Host and SSD bytes: whole pages, for the whole step."""
        rooms = {"host": 0, "ssd": 0}
        for region in self.trace.regions:
            for nbytes, to_ssd, _ in self.moved(region, self.entry(region)):
                rooms["ssd" if to_ssd else "host"] += -(-nbytes // PAGE) * PAGE
        if self.plan.outside != "device":
            rooms[self.plan.outside] += -(-self.trace.outside_saved_bytes // PAGE) * PAGE
        if self.trace.device != "cpu" and self.uses_ssd():
            rooms["host"] += self.staging_bytes
        self.host_bytes, self.ssd_bytes = rooms["host"], rooms["ssd"]

    def device_levels(self) -> list[int]:
        """Return the bytes alive in each phase, and at the optimizer's step."""
        levels = []
        for phase in range(2 * len(self.trace.regions) + 2):
            standing = sum(
                nbytes for first, last, nbytes in self.lifetimes if first <= phase <= last
            )
            levels.append(standing + self.on_its_way(phase))
        return [*levels, self.trace.optimizer_peak_bytes]

    def uses_ssd(self) -> bool:
        """Return whether anything goes to SSD."""
        inputs = [
            r.input_nbytes
            for r in self.trace.regions
            if self.entry(r).input == "ssd" and not self.entry(r).plain
        ]
        ops = [
            o.nbytes
            for r in self.plan.regions
            if not r.plain
            for o in r.ops
            if o.placement == "ssd"
        ]
        return self.plan.outside == "ssd" or any([*inputs, *ops])

    def on_its_way(self, phase: int) -> int:
        """Return the bytes of copies out that the program may not have let go of in a phase."""
        if self.trace.device == "cpu":
            return self.staging_bytes if self.uses_ssd() else 0
        if self.drained_at is not None and phase >= self.drained_at:
            return 0
        sent = 0
        for k, region in enumerate(self.trace.regions):
            if k <= phase:
                sent += sum(nbytes for nbytes, _, _ in self.moved(region, self.entry(region)))
        return min(sent, max([self.plan.window_bytes, *(size for _, size in self.leaving)]))


def same_shapes(a: RegionTrace, b: RegionTrace) -> bool:
    """Return whether two regions ran the same ops on the same shapes."""

    def facts(r: RegionTrace) -> list[object]:
        sizes = [r.group, r.input_nbytes, r.saved_nbytes, r.grad_nbytes]
        return [
            *sizes,
            *(
                (op.position, op.op, op.nbytes, op.saved_nbytes, op.kind, op.placeable)
                for op in r.ops
            ),
        ]

    return facts(a) == facts(b)
