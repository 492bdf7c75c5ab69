"""What the planner must know of a machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Rates of one machine, measured or assumed; `source` says which.

    Args:
        device: device type, "cuda" or "cpu".
        name: the device's own name.
        d2h_bytes_per_s: device to host, one large page-locked copy, bytes per second.
        h2d_bytes_per_s: host to device, likewise.
        ssd_write_bytes_per_s: sequential write into the spill directories; 0 without one.
        ssd_read_bytes_per_s: sequential read, likewise.
        duplex_bytes_per_s: both directions together while both are busy; 0 where it was not measured.
        page_lock_bytes_per_s: host memory faulted in and page-locked, likewise.
        source: "measured", where the figures were kept, or the reason why one was assumed.
    """

    device: str
    name: str
    d2h_bytes_per_s: float
    h2d_bytes_per_s: float
    ssd_write_bytes_per_s: float = 0.0
    ssd_read_bytes_per_s: float = 0.0
    duplex_bytes_per_s: float = 0.0
    page_lock_bytes_per_s: float = 0.0
    source: str = "measured"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Hardware:
        """Build from what `to_dict` returned."""
        return cls(**data)
