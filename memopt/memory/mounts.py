"""Which file system a path is on, as the kernel's table of mounts tells it (proc_pid_mountinfo(5))."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"})
NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "glusterfs", "beegfs", "gpfs", "9p", "afs"}
)


@dataclass(frozen=True, kw_only=True)
class Mount:
    """One mounted file system.

    Args:
        point: where it is mounted.
        kind: the file system's type ("ext4", "tmpfs", "fuse.sshfs").
        source: what is mounted ("/dev/nvme0n1p1", "overlay", "host:/export").
        device: "major:minor" of the block device; major 0 where there is none.
    """

    point: str
    kind: str
    source: str
    device: str

    @property
    def is_memory(self) -> bool:
        """Whether its files are memory by another name."""
        return self.kind in MEMORY

    @property
    def is_network(self) -> bool:
        """Whether another machine holds its files."""
        return self.kind in NETWORK or self.kind.startswith("fuse.sshfs")


def mount_of(path: str | Path, *, proc: Path = Path("/proc/self")) -> Mount:
    """Return the mount that holds `path` (an absolute path without links).

    Raises:
        OSError: there is no table of mounts.
        LookupError: no mount in it holds the path.
    """
    wanted = Path(path)
    found: Mount | None = None
    for line in (proc / "mountinfo").read_text().splitlines():
        mount = _parse(line)
        if mount is None or not wanted.is_relative_to(mount.point):
            continue
        # The last of equals: a later mount hides an earlier one at the same point.
        if found is None or len(mount.point) >= len(found.point):
            found = mount
    if found is None:
        raise LookupError(f"{path} is below no mount of {proc / 'mountinfo'}")
    return found


def _parse(line: str) -> Mount | None:
    """Parse `id parent major:minor root point options ... - kind source super-options`."""
    fields, dash, tail = line.partition(" - ")
    before, after = fields.split(" "), tail.split(" ")
    if not dash or len(before) < 5 or len(after) < 2:
        return None
    return Mount(
        point=unescape(before[4]),
        kind=after[0],
        source=unescape(after[1]),
        device=before[2],
    )


def unescape(field: str) -> str:
    """Return a field of the table with its octal escapes (of spaces, tabs, backslashes) undone."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field)
