"""Rates of this machine: measured at leisure by `memopt probe`, kept in a cache, found again by sessions.

Two things are kept, each under a key of everything it depends on. The link: GPU (name, UUID, memory), driver, torch and
its CUDA, the machine's name and the number of CPUs that this process may use. The SSD: the devices, sources and file
systems of all directories that are used together, the I/O engine, machine and CPUs. Only `memopt probe` writes: what a
session measures beside the user's program is not good enough to be believed for weeks.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from memopt.io import EngineName, ExtentStore, open_engine
from memopt.io.depth import depth_for
from memopt.memory.machine import cpu_name, driver_version, num_usable_cpus
from memopt.memory.mounts import MEMORY, mount_of
from memopt.memory.probe_cache import Kept, ProbeCache
from memopt.memory.rates import (
    DiskRates,
    LinkRates,
    LockRate,
    measure_disk,
    measure_link,
    measure_page_locking,
)
from memopt.types.hardware import Hardware

LINK_NAMES = ("d2h_bytes_per_s", "h2d_bytes_per_s", "duplex_bytes_per_s", "page_lock_bytes_per_s")
SSD_NAMES = ("write_bytes_per_s", "read_bytes_per_s")
PROBE_SSD_BYTES = 512 << 20
"""At most this is written to a set of directories in one probe."""
_PROBE_LOCK_BYTES = 1 << 30
Progress = Callable[[str, float], None]


def device_name(device: torch.device) -> str:
    """Return what `Hardware.name` says of a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def link_key(device: torch.device) -> dict[str, Any]:
    """Return what the rates between device and host depend on."""
    key: dict[str, Any] = {
        "machine": platform.node(),
        "num_cpus": num_usable_cpus(),
        "torch": torch.__version__,
        "device": device.type,
    }
    if device.type != "cuda":
        return {**key, "name": cpu_name()}
    properties = torch.cuda.get_device_properties(device)
    return {
        **key,
        "name": properties.name,
        "uuid": str(getattr(properties, "uuid", "")),
        "memory_bytes": properties.total_memory,
        "cuda": str(torch.version.cuda),
        "driver": driver_version(),
    }


def ssd_key(paths: Sequence[str], engine: str) -> dict[str, Any]:
    """Return what the rates of directories that are used together depend on.

    Raises:
        OSError: a directory is missing.
    """
    return {
        "machine": platform.node(),
        "num_cpus": num_usable_cpus(),
        "engine": engine,
        "directories": sorted(map(_place, paths), key=lambda place: sorted(place.items())),
    }


def _place(path: str) -> dict[str, str]:
    """Return what tells one disk from another."""
    number = Path(path).stat().st_dev
    try:
        mount = mount_of(path)
        kind, source = mount.kind, mount.source
    except (OSError, LookupError):
        kind = source = ""
    return {"device": f"{os.major(number)}:{os.minor(number)}", "kind": kind, "source": source}


@dataclass(frozen=True, kw_only=True)
class KeptRates:
    """What the cache knows of one session's device and directories.

    Args:
        device: the session's.
        needs_ssd: whether there are directories at all.
        link, ssd: figures; None where there are none.
        notes: files that could not be used, and why.
    """

    device: torch.device
    needs_ssd: bool
    link: Kept | None
    ssd: Kept | None
    notes: tuple[str, ...] = ()

    @classmethod
    def find(
        cls,
        device: torch.device,
        paths: Sequence[str],
        engine: str,
        cache: ProbeCache | None = None,
    ) -> KeptRates:
        """Look both up; `paths` are the directories used together, by the I/O engine `engine`."""
        cache = cache or ProbeCache.from_environment()
        link = cache.load("link", link_key(device), LINK_NAMES)
        ssd = None
        if paths:
            try:
                ssd = cache.load("ssd", ssd_key(paths, engine), SSD_NAMES)
            except OSError as error:
                cache.notes.append(f"kept SSD rates are not looked up: {error}")
        return cls(
            device=device, needs_ssd=bool(paths), link=link, ssd=ssd, notes=tuple(cache.notes)
        )

    @property
    def complete(self) -> bool:
        """Whether nothing is left to measure."""
        return self.link is not None and (self.ssd is not None or not self.needs_ssd)

    def hardware(self, measured: Hardware | None) -> Hardware:
        """Return the rates for the planner: what is kept, over what was `measured` (None when complete)."""
        assert measured is not None or self.complete, "something is left to measure"
        rates = {} if self.link is None else dict(self.link.rates)
        if self.ssd is not None:
            rates.update({f"ssd_{name}": rate for name, rate in self.ssd.rates.items()})
        fields = (
            {"device": self.device.type, "name": device_name(self.device)}
            if measured is None
            else measured.to_dict()
        )
        return Hardware(**{**fields, **rates, "source": self._source(measured)})

    def _source(self, measured: Hardware | None) -> str:
        if self.link is None and self.ssd is None:
            assert measured is not None
            return measured.source
        link = self.link.provenance if self.link else measured.source if measured else ""
        if not self.needs_ssd:
            return f"link {link}"
        return f"link {link}; SSD {self.ssd.provenance if self.ssd else 'measured'}"


@dataclass(frozen=True, kw_only=True)
class SsdProbe:
    """Rates of directories used together, with how many blocks in flight, and where the figures come from."""

    paths: tuple[str, ...]
    engine: str
    queue_depth: int
    rates: DiskRates
    provenance: str


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What `memopt probe` found.

    Args:
        hardware: for the planner: with the rates of all directories together.
        link, page_locking, ssd: one by one; `ssd` holds each directory alone, then all together.
        link_provenance: "measured now", or since when the figures are kept.
        kept_in: the cache's directory; None where it is off or cannot be written.
        notes: what could not be read, measured or kept, and why.
    """

    hardware: Hardware
    link: LinkRates
    page_locking: LockRate
    ssd: tuple[SsdProbe, ...]
    link_provenance: str
    kept_in: str | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dictionary."""
        return asdict(self)


def probe(
    device: torch.device,
    directories: Sequence[tuple[str, int]],
    *,
    engine: EngineName = "auto",
    fresh: bool = False,
    cache: ProbeCache | None = None,
    progress: Progress | None = None,
) -> ProbeResult:
    """Measure this machine, or find what was measured before, and keep it.

    Args:
        device: whose link to measure.
        directories: (directory, bytes that may be written at most) of the SSD tier.
        engine: the I/O engine; rates are kept per engine.
        fresh: measure also what is kept.
        cache: where to look and keep; None: what the environment names.
        progress: called with what is being measured and the share of it that is done.

    Raises:
        OSError: a directory cannot be written.
        IoEngineUnavailable: the engine asked for by name cannot run here.
    """
    cache = cache or ProbeCache.from_environment()
    progress = progress or _no_progress
    link, locking, link_from = _probe_link(device, cache, fresh, progress)
    sets: list[list[tuple[str, int]]] = [[directory] for directory in directories]
    if len(directories) > 1:
        sets.append(list(directories))
    ssd = tuple(_probe_ssd(some, engine, cache, fresh, progress) for some in sets)
    notes = [*cache.notes, *(reason for reason in (link.reason, locking.reason) if reason)]
    together = ssd[-1].rates if ssd else None
    hardware = Hardware(
        device=device.type,
        name=device_name(device),
        d2h_bytes_per_s=link.d2h_bytes_per_s,
        h2d_bytes_per_s=link.h2d_bytes_per_s,
        duplex_bytes_per_s=link.duplex_bytes_per_s,
        page_lock_bytes_per_s=locking.bytes_per_s,
        ssd_write_bytes_per_s=together.write_bytes_per_s if together else 0.0,
        ssd_read_bytes_per_s=together.read_bytes_per_s if together else 0.0,
        source=f"link {link_from}" + (f"; SSD {ssd[-1].provenance}" if ssd else ""),
    )
    return ProbeResult(
        hardware=hardware,
        link=link,
        page_locking=locking,
        ssd=ssd,
        link_provenance=link_from,
        kept_in=None if cache.directory is None or cache.is_refused else str(cache.directory),
        notes=tuple(dict.fromkeys(notes)),
    )


def _no_progress(label: str, share: float) -> None:
    del label, share


def _probe_link(
    device: torch.device, cache: ProbeCache, fresh: bool, progress: Progress
) -> tuple[LinkRates, LockRate, str]:
    key = link_key(device)
    kept = None if fresh else cache.load("link", key, LINK_NAMES)
    if kept is not None:
        d2h, h2d, duplex, locking = (kept.rates[name] for name in LINK_NAMES)
        link = LinkRates(
            d2h_bytes_per_s=d2h,
            h2d_bytes_per_s=h2d,
            duplex_bytes_per_s=duplex,
            locked=device.type == "cuda",
        )
        return link, LockRate(bytes_per_s=locking, nbytes=0), kept.provenance
    progress("link", 0.0)
    link = measure_link(device)
    progress("page-locking", 0.0)
    lock = measure_page_locking(device, _lock_bytes())
    progress("page-locking", 1.0)
    if device.type != "cuda" or (link.locked and lock.bytes_per_s):
        rates = {
            "d2h_bytes_per_s": link.d2h_bytes_per_s,
            "h2d_bytes_per_s": link.h2d_bytes_per_s,
            "duplex_bytes_per_s": link.duplex_bytes_per_s,
            "page_lock_bytes_per_s": lock.bytes_per_s,
        }
        cache.store("link", key, rates)
    else:  # a limit may be lifted tomorrow
        cache.notes.append("the link's rates are not kept: they are those of pageable memory")
    return link, lock, "measured now"


def _lock_bytes() -> int:
    """At most a GiB, and not more than an eighth of what is free."""
    from memopt.memory.host import host_facts

    return max(1 << 22, min(_PROBE_LOCK_BYTES, host_facts().free_bytes // 8) >> 20 << 20)


def _probe_ssd(
    directories: Sequence[tuple[str, int]],
    engine: EngineName,
    cache: ProbeCache,
    fresh: bool,
    progress: Progress,
) -> SsdProbe:
    paths = tuple(path for path, _ in directories)
    label = " + ".join(paths)
    depth = depth_for({}, num_directories=len(paths))
    with open_engine(engine, queue_depth=depth, directory=paths[0]) as opened:
        if opened.reason:
            cache.notes.append(f"I/O engine {opened.name}: {opened.reason}")
        key = ssd_key(paths, opened.name)
        cache.notes += [
            f"{path} is memory ({where['kind']}), not a disk"
            for path, where in zip(paths, map(_place, paths), strict=True)
            if where["kind"] in MEMORY
        ]
        kept = None if fresh else cache.load("ssd", key, (*SSD_NAMES, "probed_bytes"))
        if kept is not None:
            write, read, probed = kept.rates.values()
            rates = DiskRates(
                write_bytes_per_s=write, read_bytes_per_s=read, probed_bytes=int(probed)
            )
            return SsdProbe(
                paths=paths,
                engine=opened.name,
                queue_depth=opened.queue_depth,
                rates=rates,
                provenance=kept.provenance,
            )
        share = PROBE_SSD_BYTES // len(directories)
        limited = [(path, min(size, share)) for path, size in directories]
        with ExtentStore(limited, opened) as store:
            for file in store.files:
                if not file.is_direct:
                    cache.notes.append(
                        f"{file.path}: no direct I/O ({file.direct_reason}); the page cache takes part"
                    )
            total = store.stats().budget_bytes
            rates = measure_disk(store, total, progress=lambda done: progress(label, done))
        cache.store("ssd", key, asdict(rates))
    return SsdProbe(
        paths=paths,
        engine=opened.name,
        queue_depth=opened.queue_depth,
        rates=rates,
        provenance="measured now",
    )
