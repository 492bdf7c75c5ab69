"""Plan: where the bytes of every region live. Saved as JSON, edited, diffed, run elsewhere."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from memopt.types.errors import ConfigError

Placement = Literal["device", "host", "ssd", "recompute"]
PLACEMENTS: tuple[str, ...] = get_args(Placement)
FORMAT = "memopt-plan-1"


def check_placement(value: str, allowed: tuple[str, ...] = PLACEMENTS) -> Placement:
    """Return `value` as a Placement or raise a ConfigError that lists what is allowed."""
    if value not in allowed:
        raise ConfigError(f"placement {value!r} is not one of {', '.join(allowed)}")
    return value  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class OpPlacement:
    """Placement of one op's new outputs; ops that a plan does not list are recomputed."""

    position: int
    op: str
    placement: Placement
    nbytes: int = 0

    def __post_init__(self) -> None:
        """Refuse unknown placements and negative positions."""
        check_placement(self.placement)
        if self.position < 0:
            raise ConfigError(f"op position {self.position} is negative; positions count from 0")


@dataclass(frozen=True, kw_only=True)
class RegionPlan:
    """One region: left alone (`plain`), or its input and op outputs placed."""

    name: str
    plain: bool = False
    input: Placement = "device"
    ops: tuple[OpPlacement, ...] = ()

    def __post_init__(self) -> None:
        """The input cannot be recomputed: it is what recomputation starts from."""
        check_placement(self.input, ("device", "host", "ssd"))


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Peaks in bytes and the time of one step, as the cost model sees them."""

    device_bytes: int = 0
    host_bytes: int = 0
    ssd_bytes: int = 0
    step_s: float = 0.0
    exposed_s: float = 0.0
    d2h_bytes: int = 0

    def after(self, earlier: Prediction) -> Prediction:
        """Return this with the larger peaks of both: what a run under one plan and then the other reaches."""
        return replace(
            self,
            device_bytes=max(self.device_bytes, earlier.device_bytes),
            host_bytes=max(self.host_bytes, earlier.host_bytes),
            ssd_bytes=max(self.ssd_bytes, earlier.ssd_bytes),
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole step's placements.

    Args:
        regions: by region name; a region that the plan does not name is recomputed.
        outside: placement of what autograd saves outside regions: device, host or ssd.
        window_bytes: at most this much is on its way from the device at one time.
        prefetch_bytes: at most this much is fetched ahead of the region that needs it.
        predicted: what the solver expects.
        solver: name of what made the plan.
        notes: what the user should know of it.
    """

    regions: tuple[RegionPlan, ...] = ()
    outside: Placement = "device"
    window_bytes: int = 1 << 30
    prefetch_bytes: int = 4 << 30
    predicted: Prediction = field(default_factory=Prediction)
    solver: str = "user"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Validate what a hand-edited file can get wrong."""
        check_placement(self.outside, ("device", "host", "ssd"))
        if self.window_bytes <= 0 or self.prefetch_bytes <= 0:
            raise ConfigError(
                f"window_bytes={self.window_bytes} and prefetch_bytes={self.prefetch_bytes} "
                "must be positive"
            )
        names = [r.name for r in self.regions]
        twice = {n for n in names if names.count(n) > 1} if len(set(names)) < len(names) else set()
        if twice:
            raise ConfigError(f"plan names regions more than once: {', '.join(sorted(twice))}")

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dictionary."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Build from what `to_dict` returned; ConfigError when it is no plan."""
        if data.get("format") != FORMAT:
            raise ConfigError(
                f"not a memopt plan: format is {data.get('format')!r}, not {FORMAT!r}"
            )
        body = {k: v for k, v in data.items() if k != "format"}
        try:
            regions = tuple(
                RegionPlan(**{**r, "ops": tuple(OpPlacement(**o) for o in r["ops"])})
                for r in body.pop("regions")
            )
            predicted = Prediction(**body.pop("predicted"))
            notes = tuple(body.pop("notes"))
            return cls(regions=regions, predicted=predicted, notes=notes, **body)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"not a memopt plan: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what `save` wrote."""
        try:
            data = json.loads(Path(path).read_text())
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{path} is not a memopt plan: it holds a {type(data).__name__}")
        return cls.from_dict(data)
