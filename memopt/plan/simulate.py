"""Timeline of one training step under a plan: device bytes phase by phase, transfers, waits.

The step is a chain of phases: the forward of every region, the turning point (what runs outside regions, the loss
among it), the backward of every region in reverse, the optimizer. Compute, device-to-host and host-to-device copies,
SSD writes and reads are five queues that each work in order.

- Out: a tensor leaves when its op has produced it. What is on its way holds at most `window_bytes` of the device; a
  tensor that finds the window full makes compute wait (a tensor larger than the window waits until it is empty).
- Back: when a region's recompute starts, up to `prefetch_bytes` of the next region that needs any are asked for, whole
  tensors, in order of need. The rest is asked for at that region's own start, and compute waits for what is late.
- A plain region runs untouched, so nothing starts there.
- Where the device is the CPU, "ssd" means a memcpy to a staging buffer by the compute thread, then a write by I/O
  threads; back likewise. The memcpy counts as exposed time.

Device bytes of a phase are the sum of five terms: what stands (states, inputs, stored outputs), new gradients, the
running region's transients, what is on its way out, what came back early. They are counted in the order in which
the program allocates, not in device time: the caching allocator gives memory out as kernels are queued, far ahead of
the device, so a source is only sure to be free once a full window pushed it out. A full window therefore stays
counted once that much has left. On CPU the staging buffers hold both, and count whole as soon as anything uses them.

Differs from schedules that keep two fixed rounding buffers (MEMO, arXiv 2407.12117, section 4.1): the window is in
bytes, tensors of several regions may be in it, and gradients that do not exist yet leave their bytes to activations.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from memopt.plan import engine_facts
from memopt.plan.cost import (
    Choice,
    RegionLoad,
    StepModel,
    Transfer,
    aligned,
    assumed_hardware,
    build,
    choice_of,
)
from memopt.types.errors import ConfigError
from memopt.types.hardware import Hardware
from memopt.types.plan import Placement, Plan, Prediction, RegionPlan
from memopt.types.trace import StepTrace

TERMS = ("standing", "new gradients", "transient", "on its way out", "fetched early")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a plan fixes beside the regions' placements."""

    window_bytes: int
    prefetch_bytes: int
    outside: Placement = "device"


@dataclass(frozen=True, slots=True)
class Timeline:
    """Outcome of one simulation.

    `levels` holds device bytes per phase: forward of regions 0..n-1, turning point, backward of regions n-1..0, end
    of backward, optimizer. `terms` holds each level's parts in the order of TERMS.
    """

    step_s: float
    exposed_s: float
    device_bytes: int
    host_bytes: int
    ssd_bytes: int
    d2h_bytes: int
    levels: tuple[int, ...]
    terms: tuple[tuple[int, int, int, int, int], ...]

    def prediction(self) -> Prediction:
        """Return what a Plan carries of it."""
        return Prediction(
            device_bytes=self.device_bytes,
            host_bytes=self.host_bytes,
            ssd_bytes=self.ssd_bytes,
            step_s=self.step_s,
            exposed_s=self.exposed_s,
            d2h_bytes=self.d2h_bytes,
        )


class _Queues:
    """The transfer queues and the compute clock."""

    def __init__(self, hardware: Hardware, window_bytes: int) -> None:
        self.on_cpu = hardware.device == "cpu"
        self.d2h = 1.0 / hardware.d2h_bytes_per_s
        self.h2d = 1.0 / hardware.h2d_bytes_per_s
        self.write = (
            1.0 / hardware.ssd_write_bytes_per_s
            if hardware.ssd_write_bytes_per_s > 0
            else float("inf")
        )
        self.read = (
            1.0 / hardware.ssd_read_bytes_per_s
            if hardware.ssd_read_bytes_per_s > 0
            else float("inf")
        )
        self.window_bytes = window_bytes
        self.clock = self.exposed = 0.0
        self.d2h_free = self.h2d_free = self.write_free = self.read_free = 0.0
        self.pending: deque[tuple[float, int]] = deque()  # (finish, bytes) of what is in the window
        self.pending_bytes = 0
        self.sent_bytes = 0

    def wait_until(self, moment: float) -> None:
        """Compute waits."""
        if moment > self.clock:
            self.exposed += moment - self.clock
            self.clock = moment

    def send(self, item: Transfer) -> float:
        """Queue a tensor that exists now; return when it has arrived."""
        pending, nbytes = self.pending, item.nbytes
        while pending and (
            pending[0][0] <= self.clock or self.pending_bytes + nbytes > self.window_bytes
        ):
            finish, gone = pending.popleft()
            self.pending_bytes -= gone
            self.wait_until(finish)
        if self.on_cpu:
            self.wait_until(self.clock + nbytes * self.d2h)
            finish = self.write_free = max(self.write_free, self.clock) + nbytes * self.write
        else:
            finish = self.d2h_free = max(self.d2h_free, self.clock) + nbytes * self.d2h
            if item.to_ssd:
                finish = self.write_free = max(self.write_free, finish) + nbytes * self.write
        pending.append((finish, nbytes))
        self.pending_bytes += nbytes
        self.sent_bytes += nbytes
        return finish

    def fetch(self, nbytes: int, from_ssd: bool, not_before: float) -> float:
        """Ask for a stored tensor now; return when it is back on the device (CPU: in staging)."""
        ready = max(self.clock, not_before)
        if from_ssd:
            ready = self.read_free = max(self.read_free, ready) + nbytes * self.read
            if self.on_cpu:
                return ready
        self.h2d_free = max(self.h2d_free, ready) + nbytes * self.h2d
        return self.h2d_free


def split_back(back: Sequence[tuple[int, bool]], prefetch_bytes: int) -> int:
    """Return how many of the tensors in `back`, in order, fit in a prefetch of `prefetch_bytes`."""
    total = 0
    for count, (nbytes, _) in enumerate(back):
        total += nbytes
        if total > prefetch_bytes:
            return count
    return len(back)


def shared_bytes(loads: Sequence[RegionLoad]) -> list[int]:
    """Return per region what of its input stands already: the region before keeps it as an output of its own."""
    before = [0, *(load.output_bytes for load in loads)]
    return [min(kept, load.input_bytes) for kept, load in zip(before, loads, strict=False)]


class _Run:
    """One simulation: walks the phases and notes each one's bytes."""

    def __init__(self, model: StepModel, loads: Sequence[RegionLoad], settings: Settings) -> None:
        self.model, self.loads, self.settings = model, loads, settings
        self.queues = _Queues(model.hardware, settings.window_bytes)
        outside = settings.outside == "device"
        beside = model.beside_bytes if outside else (0,) * len(loads)
        self.standing = model.base_bytes + outside * max(0, model.outside_bytes - sum(beside))
        shared = shared_bytes(loads)
        self.stands = [
            load.kept_bytes - twice + more
            for load, twice, more in zip(loads, shared, beside, strict=True)
        ]
        self.gradients = 0
        self.terms: list[tuple[int, int, int, int, int]] = []
        largest = max((item.nbytes for load in loads for item in load.out), default=0)
        self.most_on_way = max(settings.window_bytes, largest)
        self.arrived = [0.0] * len(loads)
        self.lent = 0
        self.drained = False
        uses_ssd = settings.outside == "ssd" or any(load.ssd_bytes for load in loads)
        self.staging_bytes = model.staging_bytes if uses_ssd else 0

    def note(self, transient: int, fetched: int = 0) -> None:
        """Record the phase that ends now."""
        out = min(self.queues.sent_bytes, self.most_on_way)
        if self.queues.on_cpu:
            out, fetched = self.staging_bytes, 0
        elif self.drained:
            out = 0
        self.terms.append((self.standing, self.gradients, transient, out, fetched))

    def forward(self) -> None:
        queues = self.queues
        for k, (load, region) in enumerate(zip(self.loads, self.model.models, strict=True)):
            begin, waited = queues.clock, queues.exposed
            for item in load.out:
                queues.clock = max(queues.clock, begin + item.offset_s + queues.exposed - waited)
                self.arrived[k] = queues.send(item)
            queues.clock = begin + region.forward_s + queues.exposed - waited
            own = self.stands[k]
            self.standing += region.region.around_nbytes
            self.lent += region.region.around_nbytes
            self.note(load.forward_bytes + own - load.kept_bytes)
            self.standing += own + load.lent_bytes
            self.lent += load.lent_bytes

    def turning_point(self) -> None:
        model, queues, outside = self.model, self.queues, self.settings.outside
        queues.clock += model.outside_s
        if outside != "device":  # what the loss saved is needed at once: both ways are exposed
            moved = model.trace.outside_saved_bytes
            self.exposed_round_trip(moved, outside == "ssd")
        self.note(model.output_bytes + model.trace.outside_peak_bytes)
        self.standing -= self.lent
        self.gradients += model.outside_grad_bytes

    def exposed_round_trip(self, nbytes: int, to_ssd: bool) -> None:
        queues = self.queues
        per_byte = queues.d2h + queues.h2d
        if to_ssd:
            per_byte += queues.write + queues.read
        queues.wait_until(queues.clock + nbytes * per_byte)

    def backward(self) -> None:
        model, loads, queues = self.model, self.loads, self.queues
        asked = (
            0  # how many tensors of the next region in need are on their way back, and their bytes
        )
        asked_bytes, asked_ready = 0, 0.0
        for k in range(len(loads) - 1, -1, -1):
            load, region = loads[k], model.models[k]
            if not load.plain:
                if not self.drained and engine_facts.DRAINS_BEFORE_BACKWARD:
                    self.drain()
                ready = asked_ready
                for nbytes, from_ssd in load.back[asked:]:
                    ready = queues.fetch(nbytes, from_ssd, self.arrived[k])
                asked, asked_bytes, asked_ready = self.ask_ahead(k)
                queues.wait_until(ready)
                if queues.on_cpu:
                    staged = sum(nbytes for nbytes, _ in load.back)
                    queues.wait_until(queues.clock + staged * queues.h2d)
                queues.clock += load.rerun_s
            queues.clock += region.backward_s
            self.note(load.backward_bytes + self.grad_of_output(k), asked_bytes)
            self.standing -= self.stands[k]
            self.gradients += model.grad_bytes[k]

    def drain(self) -> None:
        """Compute waits for every copy out, and their sources go."""
        self.drained = True
        if self.queues.pending and not self.queues.on_cpu:
            self.queues.wait_until(self.queues.d2h_free)

    def grad_of_output(self, k: int) -> int:
        """Return the bytes of the gradient that enters region k's backward."""
        models = self.model.models
        return models[k + 1].region.input_nbytes if k + 1 < len(models) else self.model.output_bytes

    def ask_ahead(self, k: int) -> tuple[int, int, float]:
        """Fetch ahead for the next region below k that is not plain; (tensors, bytes, ready)."""
        for below in range(k - 1, -1, -1):
            load = self.loads[below]
            if load.plain:
                continue
            count = split_back(load.back, self.settings.prefetch_bytes)
            ready = 0.0
            for nbytes, from_ssd in load.back[:count]:
                ready = self.queues.fetch(nbytes, from_ssd, self.arrived[below])
            return count, sum(nbytes for nbytes, _ in load.back[:count]), ready
        return 0, 0, 0.0

    def finish(self) -> Timeline:
        model, trace, queues, loads = self.model, self.model.trace, self.queues, self.loads
        self.note(model.models[0].region.input_nbytes)
        self.terms.append((max(0, trace.optimizer_peak_bytes), 0, 0, 0, 0))
        levels = tuple(map(sum, self.terms))
        host = sum(load.host_bytes for load in loads)
        ssd = sum(load.ssd_bytes for load in loads)
        moved = sum(item.nbytes for load in loads for item in load.out)
        outside = self.settings.outside
        if outside != "device":
            moved += trace.outside_saved_bytes
            if outside == "ssd":
                ssd += aligned(trace.outside_saved_bytes)
            else:
                host += aligned(trace.outside_saved_bytes)
        if not queues.on_cpu:
            host += self.staging_bytes
        micro = trace.num_micro_batches
        return Timeline(
            step_s=queues.clock * micro + trace.optimizer_s,
            exposed_s=queues.exposed * micro,
            device_bytes=max(levels),
            host_bytes=host,
            ssd_bytes=ssd,
            d2h_bytes=moved * micro,
            levels=levels,
            terms=tuple(self.terms),
        )


def simulate(model: StepModel, loads: Sequence[RegionLoad], settings: Settings) -> Timeline:
    """Run the step once in the model and return what it takes."""
    run = _Run(model, loads, settings)
    run.forward()
    run.turning_point()
    run.backward()
    return run.finish()


def loads_of(model: StepModel, choices: Sequence[Choice]) -> list[RegionLoad]:
    """Return one load per region."""
    return [region.load(choice) for region, choice in zip(model.models, choices, strict=True)]


def choices_of(model: StepModel, plan: Plan) -> list[Choice]:
    """Return the choices that a Plan means for the regions of the model's trace.

    Raises:
        ConfigError: the plan names a region, an op or a placement that the trace's step cannot have.
    """
    by_name = {region.name: region for region in plan.regions}
    unknown = set(by_name) - {region.name for region in model.trace.regions}
    if unknown:
        raise ConfigError(
            f"the plan names regions that the step does not have: {', '.join(sorted(unknown))}"
        )
    choices = [choice_of(region, by_name.get(region.name)) for region in model.trace.regions]
    if model.hardware.device == "cpu":
        used = {p for choice in choices for p in (choice.input, *choice.ops)} | {plan.outside}
        if "host" in used:
            raise ConfigError(
                "placement 'host' means nothing where the device is the CPU: use 'ssd' or 'device'"
            )
    return choices


def settings_of(plan: Plan) -> Settings:
    """Return the settings of a Plan."""
    return Settings(plan.window_bytes, plan.prefetch_bytes, plan.outside)


def predict(
    trace: StepTrace, plan: Plan, hardware: Hardware, *, staging_bytes: int = 0
) -> Prediction:
    """Return the peaks in bytes and the seconds of one step of `trace` under `plan`.

    Args:
        trace: the step.
        plan: the plan.
        hardware: the machine's rates.
        staging_bytes: size of the buffers in front of the SSD.

    Raises:
        ConfigError: plan, trace and hardware do not belong together.
    """
    model = build(trace, hardware, staging_bytes)
    return simulate(model, loads_of(model, choices_of(model, plan)), settings_of(plan)).prediction()


def predict_plain(trace: StepTrace) -> int:
    """Return the device peak in bytes of the untouched step."""
    model = build(trace, assumed_hardware(trace.device))
    choices = [
        choice_of(region, RegionPlan(name=region.name, plain=True)) for region in trace.regions
    ]
    return simulate(model, loads_of(model, choices), Settings(1, 1)).device_bytes
