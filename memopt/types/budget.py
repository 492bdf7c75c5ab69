"""Budget: how many bytes a training step may use on the device, in host memory and on SSD.

A `Budget` is what the user wrote: checked for sense, still free of any machine. `Budget.resolve` turns it into a
`ResolvedBudget`, plain bytes, once the machine's facts are known; the facts are passed in (`memopt.memory.host` finds
them), so that a plan can be made for a machine that is not this one.

A directory on tmpfs is memory by another name. It is accepted, with a warning, and its bytes come out of the host
budget; a plan that "spills to SSD" there would otherwise be killed by the memory limit that it was made to respect.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from memopt.types.errors import ConfigError
from memopt.types.sizes import format_bytes, parse_size

# Of what the cgroup leaves; the rest is for the user's own program and its data loader.
HOST_SHARE_BY_DEFAULT = Fraction(4, 5)


_LEAST_SSD_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """Host memory as this process may use it: `limit_bytes` in all (cgroup or machine), `free_bytes` of it now."""

    limit_bytes: int
    free_bytes: int


@dataclass(frozen=True, kw_only=True)
class DirectoryFacts:
    """What `resolve` must know of a spill directory.

    `file_system` is any value equal for two directories of one file system: their free bytes are the same bytes.
    """

    is_directory: bool
    is_writable: bool
    is_tmpfs: bool
    free_bytes: int
    file_system: int
    is_read_only: bool = False


@dataclass(frozen=True, kw_only=True)
class SsdDirectory:
    """One spill directory and the most bytes its extent file may hold."""

    path: str
    size_bytes: int
    is_tmpfs: bool


@dataclass(frozen=True, kw_only=True)
class ResolvedBudget:
    """A budget in bytes on one machine.

    `host_bytes` bounds memopt's own host buffers (0 where the device is the CPU: it is the same memory); directories
    on tmpfs are already taken out of it. `notes` says what was defaulted, ignored or is doubtful.
    `ssd_endurance_bytes` are the rated writes of the drives behind `ssd` together; None: not given.
    """

    device_bytes: int
    host_bytes: int
    ssd: tuple[SsdDirectory, ...] = ()
    notes: tuple[str, ...] = ()
    ssd_endurance_bytes: int | None = None

    @property
    def ssd_bytes(self) -> int:
        """Bytes allowed in all spill directories together."""
        return sum(directory.size_bytes for directory in self.ssd)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serialisable fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ResolvedBudget:
        """Return the value that `to_dict` described."""
        return cls(
            device_bytes=fields["device_bytes"],
            host_bytes=fields["host_bytes"],
            ssd=tuple(SsdDirectory(**directory) for directory in fields["ssd"]),
            notes=tuple(fields["notes"]),
            ssd_endurance_bytes=fields.get("ssd_endurance_bytes"),
        )


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes that a training step may use, as the user states them.

    Args:
        device: bytes that PyTorch's allocator may reserve on the card (on CPU: live tensor bytes). Default: what is
            free. A percentage is of the device's whole memory.
        host: bytes of memopt's own host buffers. Default: 80 % of what the cgroup leaves. A percentage is of all that
            the cgroup (or the machine) allows.
        ssd: "DIR:SIZE", or several of them; a percentage is of the directory's free space. Default: no SSD.

    Sizes are int bytes or text: "24GiB", "1.5TB", "80%".

    Raises:
        ConfigError: a size without sense; `resolve` raises for one that the machine does not have.

    """

    device: int | str | None = None
    host: int | str | None = None
    ssd: str | tuple[str, ...] | list[str] | None = None
    ssd_endurance: int | str | None = None

    def __post_init__(self) -> None:
        """Check everything that can be checked without a machine; keep `ssd` as a tuple."""
        for name in ("device", "host"):
            if getattr(self, name) is not None:
                parse_size(getattr(self, name), name=name)
        requests = (
            () if self.ssd is None else (self.ssd,) if isinstance(self.ssd, str) else self.ssd
        )
        if not isinstance(requests, (tuple, list)):
            raise ConfigError(f'ssd={requests!r}: write "DIR:SIZE", or a list of them')
        object.__setattr__(self, "ssd", tuple(requests))
        for request in requests:
            _parse_ssd(request)
        if self.ssd_endurance is not None:
            _parse_endurance(self.ssd_endurance)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serialisable fields."""
        return {
            "device": self.device,
            "host": self.host,
            "ssd": list(self.ssd or ()),
            "ssd_endurance": self.ssd_endurance,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Budget:
        """Return the budget that `to_dict` described."""
        return cls(
            device=fields["device"],
            host=fields["host"],
            ssd=tuple(fields["ssd"]),
            ssd_endurance=fields.get("ssd_endurance"),
        )

    def resolve(
        self,
        *,
        device_free_bytes: int,
        device_total_bytes: int,
        host: HostFacts,
        inspect_directory: Callable[[str], DirectoryFacts],
        device_is_host: bool = False,
    ) -> ResolvedBudget:
        """Turn the request into bytes on the machine described by the arguments.

        Args:
            device_free_bytes: free device memory, what this process has already reserved included.
            device_total_bytes: all of the device's memory.
            host: limits of host memory.
            inspect_directory: facts of a spill directory; OSError where it cannot tell.
            device_is_host: the device is the CPU; a host budget is then ignored with a note.

        Raises:
            ConfigError: more than exists, or a spill directory that is missing, not writable or too full.

        """
        notes: list[str] = []
        device_bytes = _device_bytes(self.device, device_free_bytes, device_total_bytes, notes)
        ssd = _ssd_directories(tuple(self.ssd or ()), inspect_directory)
        host_bytes = _host_bytes(self.host, host, notes, ignored=device_is_host)
        memory_directories = [directory for directory in ssd if directory.is_tmpfs]
        for directory in memory_directories:
            note = f"ssd directory {directory.path} is on tmpfs: it is memory, and counts as host"
            warnings.warn(note, stacklevel=2)
            notes.append(note)
        if not device_is_host:
            host_bytes -= sum(directory.size_bytes for directory in memory_directories)
            if host_bytes < 0:
                raise ConfigError(
                    f"ssd directories on tmpfs take {format_bytes(-host_bytes)} more than the whole host budget "
                    f"(host={self.host!r}): use a directory on a disk, a smaller size, or a larger host budget"
                )
        return ResolvedBudget(
            device_bytes=device_bytes,
            host_bytes=host_bytes,
            ssd=ssd,
            ssd_endurance_bytes=_endurance_bytes(self.ssd_endurance, ssd, notes),
            notes=tuple(notes),
        )


def _share(size: int | Fraction, whole_bytes: int) -> int:
    return size if isinstance(size, int) else math.floor(size * whole_bytes)


def _at_most(size: int | str, whole_bytes: int, *, name: str, whole: str) -> int:
    num_bytes = _share(parse_size(size, name=name), whole_bytes)
    if num_bytes > whole_bytes:
        raise ConfigError(
            f"{name}={size!r} is {format_bytes(num_bytes)}, more than {whole}, {format_bytes(whole_bytes)}: "
            "ask for that or less"
        )
    return num_bytes


def _device_bytes(
    size: int | str | None, free_bytes: int, total_bytes: int, notes: list[str]
) -> int:
    if size is None:
        return free_bytes
    num_bytes = _at_most(size, total_bytes, name="device", whole="the device has")
    if num_bytes > free_bytes:
        notes.append(f"device={size!r}: only {format_bytes(free_bytes)} of the device are free now")
    return num_bytes


def _host_bytes(
    size: int | str | None, facts: HostFacts, notes: list[str], *, ignored: bool
) -> int:
    if ignored:
        if size is not None:
            notes.append(
                f"host={size!r} is ignored: the device is the CPU, host memory is the same memory"
            )
        return 0
    if size is None:
        return _share(HOST_SHARE_BY_DEFAULT, facts.free_bytes)
    num_bytes = _at_most(size, facts.limit_bytes, name="host", whole="this process may use")
    if num_bytes > facts.free_bytes:
        notes.append(
            f"host={size!r}: only {format_bytes(facts.free_bytes)} of host memory are free now"
        )
    return num_bytes


def _parse_endurance(size: int | str) -> int:
    num_bytes = parse_size(size, name="ssd_endurance")
    if not isinstance(num_bytes, int):
        raise ConfigError(
            f"ssd_endurance={size!r}: a share of what? write the rated writes of the drives together, "
            'such as "600TB" (data sheets call it TBW)'
        )
    return num_bytes


def _endurance_bytes(
    size: int | str | None, ssd: tuple[SsdDirectory, ...], notes: list[str]
) -> int | None:
    if size is None:
        return None
    if all(directory.is_tmpfs for directory in ssd):
        why = "every ssd directory is memory" if ssd else "the budget names no ssd directory"
        notes.append(f"ssd_endurance={size!r} has no effect: {why}")
        return None
    return _parse_endurance(size)


def _parse_ssd(request: object) -> tuple[str, int | Fraction]:
    """Split "DIR:SIZE"; the directory may hold colons itself."""
    if not isinstance(request, str):
        raise ConfigError(f'ssd={request!r}: write "DIR:SIZE", such as "/mnt/nvme:200GiB"')
    directory, colon, size = request.rpartition(":")
    if not colon:
        raise ConfigError(
            f'ssd={request!r}: the size is missing; write "DIR:SIZE", such as "{request}:200GiB"'
        )
    if not directory:
        raise ConfigError(
            f'ssd={request!r}: the directory is missing; write "DIR:SIZE", such as "/mnt/nvme:200GiB"'
        )
    size_bytes = parse_size(size, name=f"ssd={request!r}: SIZE")
    if isinstance(size_bytes, int) and size_bytes < _LEAST_SSD_BYTES:
        raise ConfigError(
            f"ssd={request!r}: {format_bytes(size_bytes)} is below one block of "
            f"{format_bytes(_LEAST_SSD_BYTES)}; nothing could be kept there"
        )
    return directory, size_bytes


def _ssd_directories(
    requests: tuple[str, ...], inspect_directory: Callable[[str], DirectoryFacts]
) -> tuple[SsdDirectory, ...]:
    directories: list[SsdDirectory] = []
    left_bytes: dict[int, int] = {}  # per file system: two directories of one share its free space
    for request in requests:
        written, size = _parse_ssd(request)
        path = os.path.realpath(os.path.expanduser(written))  # noqa: PTH111 -- text in, text out
        if any(directory.path == path for directory in directories):
            raise ConfigError(
                f"ssd={request!r}: the directory is given twice; give each once, with its whole size"
            )
        facts = _inspect(request, path, inspect_directory)
        left = left_bytes.setdefault(facts.file_system, facts.free_bytes)
        size_bytes = _share(size, facts.free_bytes)
        if size_bytes > left:
            raise ConfigError(
                f"ssd={request!r} asks for {format_bytes(size_bytes)}, but {path} has {format_bytes(left)} free"
                f"{'' if left == facts.free_bytes else ' after the directories before it on the same file system'}: "
                "ask for less, free some space, or add a directory on another disk"
            )
        left_bytes[facts.file_system] = left - size_bytes
        directories.append(SsdDirectory(path=path, size_bytes=size_bytes, is_tmpfs=facts.is_tmpfs))
    return tuple(directories)


def _inspect(
    request: str, path: str, inspect_directory: Callable[[str], DirectoryFacts]
) -> DirectoryFacts:
    try:
        facts = inspect_directory(path)
    except FileNotFoundError:
        raise ConfigError(
            f"ssd={request!r}: the directory {path} does not exist; create it first"
        ) from None
    except OSError as error:
        raise ConfigError(f"ssd={request!r}: {path} cannot be used: {error.strerror}") from error
    if not facts.is_directory:
        raise ConfigError(
            f"ssd={request!r}: {path} is not a directory; give a directory to keep the spill file in"
        )
    if facts.is_read_only:
        raise ConfigError(
            f"ssd={request!r}: {path} is on a file system that is mounted read-only; name a directory on another"
        )
    if not facts.is_writable:
        raise ConfigError(
            f"ssd={request!r}: no permission to write in {path}; give one that this user can write in"
        )
    return facts
