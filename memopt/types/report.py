"""RunReport: what memopt predicted of a run and what it measured, side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from memopt.types.budget import ResolvedBudget
from memopt.types.errors import ConfigError

FORMAT = "memopt-run-report-1"
SECONDS_PER_DAY = 86_400


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Peak bytes and seconds of one step; None: not known (then the report shows a dash).

    Args:
        device_bytes: on CUDA allocated bytes, on CPU accounted bytes of live tensor storages.
        host_bytes: memopt's own host buffers.
        ssd_bytes: extent files.
        step_s: one whole step; where measured, a median (RunReport.num_planned_steps).
    """

    device_bytes: int | None = None
    host_bytes: int | None = None
    ssd_bytes: int | None = None
    step_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Moved:
    """Bytes moved per direction, over all steps of the run."""

    d2h_bytes: int = 0
    h2d_bytes: int = 0
    ssd_write_bytes: int = 0
    ssd_read_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class SsdWear:
    """What training writes to the spill drives, and how long they last at that rate; None: not known.

    Args:
        step_bytes: written per step, the median of the steps that the median step is of.
        day_bytes: written in 24 hours of such steps, one after the other.
        endurance_bytes: rated writes of the drives together, where the user gave them.
        lifetime_days: until so much is written at that rate.
    """

    step_bytes: int
    day_bytes: int | None = None
    endurance_bytes: int | None = None
    lifetime_days: float | None = None

    @classmethod
    def at_rate(cls, step_bytes: int, step_s: float | None, endurance_bytes: int | None) -> SsdWear:
        """Return the wear of steps that write `step_bytes` each and take `step_s` seconds."""
        a_day = round(step_bytes * SECONDS_PER_DAY / step_s) if step_s else None
        return cls(
            step_bytes=step_bytes,
            day_bytes=a_day,
            endurance_bytes=endurance_bytes,
            lifetime_days=endurance_bytes / a_day if endurance_bytes and a_day else None,
        )


@dataclass(frozen=True, kw_only=True)
class PlacementRow:
    """One kind of tensor and where the plan put it, per step.

    Args:
        kind: overload name ("aten.mm.default"), "region input" or "outside regions".
        placement: device, host, ssd or recompute.
        num_outputs: tensors of this kind with this placement, over all regions.
        size_bytes: their bytes together.
    """

    kind: str
    placement: str
    num_outputs: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What happened in one `optimize` context.

    Args:
        device: the device and its name ("cuda:0 NVIDIA H200", "cpu").
        budget: what the run was allowed.
        predicted: peaks of all plans that ran, and the step of the one that ran last (after the first step: of the
            one that runs next).
        measured: peaks of the whole run, and the median step of the plan that ran last.
        baseline: the plain step, as far as the trace knows it.
        num_steps: finished steps.
        num_planned_steps: finished steps that ran wholly under the plan that ran last, which are those the median
            step is of. 0: the median is of all steps but the first, and no step is what was predicted. None: not known.
        first_step_s: the traced step; None before its end.
        exposed_s: time that the compute stream waited for transfers, mean of all steps.
        moved: bytes per direction.
        wear: writes to the spill drives per step and per day; None without a drive or a second step.
        placements: what was placed where.
        resident_bytes: largest resident set of the process.
        device_reserved_bytes: peak that PyTorch's allocator reserved; None on CPU.
        device_context_bytes: device memory used beside the allocator; None on CPU.
        plan: what made the plan ("greedy", "uniform:host", "first step", or as a saved plan says).
        notes: fallbacks with their reasons, settings without effect, doubts.
        versions: of memopt, torch, python and what else took part.
    """

    device: str
    budget: ResolvedBudget
    predicted: Footprint
    measured: Footprint
    baseline: Footprint = field(default_factory=Footprint)
    num_steps: int = 0
    num_planned_steps: int | None = None
    first_step_s: float | None = None
    exposed_s: float | None = None
    moved: Moved = field(default_factory=Moved)
    wear: SsdWear | None = None
    placements: tuple[PlacementRow, ...] = ()
    resident_bytes: int | None = None
    device_reserved_bytes: int | None = None
    device_context_bytes: int | None = None
    plan: str = "auto"
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    # memopt.report sets this: tables need a library, and this package imports nothing.
    renderer: ClassVar[Callable[[RunReport], str] | None] = None

    @property
    def median_step_s(self) -> float | None:
        """The median step of the plan that ran last; of all but the first where no step ran wholly under it."""
        return self.measured.step_s

    def __str__(self) -> str:
        """One table; JSON where memopt.report was never imported."""
        if RunReport.renderer is not None:
            return RunReport.renderer(self)
        return json.dumps(self.to_dict(), indent=1)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dictionary; keys are the fields' names."""
        fields = asdict(self)
        fields["versions"] = dict(self.versions)
        return {"format": FORMAT, **fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunReport:
        """Build from what `to_dict` returned; ConfigError when it is no report."""
        if data.get("format") != FORMAT:
            raise ConfigError(
                f"not a memopt report: format is {data.get('format')!r}, not {FORMAT!r}"
            )
        body = {key: value for key, value in data.items() if key != "format"}
        try:
            wear = body.pop("wear", None)
            return cls(
                budget=ResolvedBudget.from_dict(body.pop("budget")),
                predicted=Footprint(**body.pop("predicted")),
                measured=Footprint(**body.pop("measured")),
                baseline=Footprint(**body.pop("baseline")),
                moved=Moved(**body.pop("moved")),
                wear=None if wear is None else SsdWear(**wear),
                placements=tuple(PlacementRow(**row) for row in body.pop("placements")),
                notes=tuple(body.pop("notes")),
                **body,
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ConfigError(f"not a memopt report: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> RunReport:
        """Read what `save` wrote; ConfigError when it is something else."""
        try:
            data = json.loads(Path(path).read_text())
        except ValueError as error:  # no JSON, or no text at all
            raise ConfigError(f"{path} is not a memopt report: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{path} is not a memopt report: it holds a {type(data).__name__}")
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{path} is {error}; `run.report().save(path)` writes one") from error
