from __future__ import annotations

import os
import tempfile
from pathlib import Path

import psutil
import pytest

from memopt.memory.host import (
    cgroup_version,
    host_facts,
    inspect_directory,
    peak_resident_bytes,
    reset_peak_resident,
    resident_bytes,
    resolve_budget,
)
from memopt.types.budget import Budget
from memopt.types.errors import ConfigError

GIB = 1 << 30
MIB = 1 << 20


def write_cgroup(directory: Path, *, limit, used: int, inactive: int, version: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    v2 = version == 2
    (directory / ("memory.max" if v2 else "memory.limit_in_bytes")).write_text(f"{limit}\n")
    (directory / ("memory.current" if v2 else "memory.usage_in_bytes")).write_text(f"{used}\n")
    key = "inactive_file" if v2 else "total_inactive_file"
    (directory / "memory.stat").write_text(f"anon 5\n{key} {inactive}\nslab 7\n")


def fake_proc(root: Path, *, path: str, version: int, mount: str, mount_root: str = "/") -> Path:
    proc = root / "proc"
    proc.mkdir()
    membership = f"0::{path}" if version == 2 else f"4:cpu:/other\n3:memory:{path}\n0::/unused"
    (proc / "cgroup").write_text(membership + "\n")
    tail = "cgroup2 cgroup2 rw" if version == 2 else "cgroup cgroup rw,memory"
    (proc / "mountinfo").write_text(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        f"35 31 0:32 {mount_root} {mount} rw,relatime shared:9 - {tail}\n"
    )
    return proc


@pytest.mark.parametrize("version", [1, 2])
def test_the_least_room_of_all_levels_counts(tmp_path, version):
    mount = tmp_path / "sys/fs/cgroup/memory"
    unlimited = "max" if version == 2 else 9223372036854771712
    write_cgroup(mount, limit=unlimited, used=9 * GIB, inactive=0, version=version)
    write_cgroup(mount / "pod", limit=2 * GIB, used=1536 * MIB, inactive=512 * MIB, version=version)
    write_cgroup(mount / "pod/task", limit=3 * GIB, used=GIB, inactive=0, version=version)
    proc = fake_proc(tmp_path, path="/pod/task", version=version, mount="/sys/fs/cgroup/memory")
    facts = host_facts(proc=proc, root=tmp_path)
    assert facts.limit_bytes == 2 * GIB
    assert facts.free_bytes == min(GIB, psutil.virtual_memory().available)


def test_where_both_versions_are_mounted_the_first_limits_memory(tmp_path):
    proc = fake_proc(tmp_path, path="/job", version=1, mount="/sys/fs/cgroup/memory")
    with (proc / "mountinfo").open("a") as mounts:
        mounts.write("36 31 0:33 / /sys/fs/cgroup/unified rw shared:10 - cgroup2 cgroup2 rw\n")
    assert "0::" in (proc / "cgroup").read_text()
    assert cgroup_version(proc=proc, root=tmp_path) == 1


def test_in_a_container_the_mount_shows_only_our_part(tmp_path):
    write_cgroup(tmp_path / "cg", limit=2 * GIB, used=GIB, inactive=0, version=1)
    write_cgroup(tmp_path / "cg/job", limit=GIB, used=GIB // 4, inactive=0, version=1)
    proc = fake_proc(tmp_path, path="/docker/a/job", version=1, mount="/cg", mount_root="/docker/a")
    facts = host_facts(proc=proc, root=tmp_path)
    assert (facts.limit_bytes, facts.free_bytes) == (GIB, GIB * 3 // 4)


def test_a_path_that_the_mount_does_not_show_begins_at_the_mount(tmp_path):
    write_cgroup(tmp_path / "cg", limit=GIB, used=0, inactive=0, version=2)
    proc = fake_proc(tmp_path, path="/../other", version=2, mount="/cg")
    assert host_facts(proc=proc, root=tmp_path).limit_bytes == GIB


def test_a_mount_point_with_a_space(tmp_path):
    write_cgroup(tmp_path / "c g/x", limit=GIB, used=0, inactive=0, version=2)
    proc = fake_proc(tmp_path, path="/x", version=2, mount="/c\\040g")
    assert host_facts(proc=proc, root=tmp_path).limit_bytes == GIB


def test_an_overfull_cgroup_leaves_nothing(tmp_path):
    write_cgroup(tmp_path / "cg/x", limit=GIB, used=2 * GIB, inactive=0, version=2)
    proc = fake_proc(tmp_path, path="/x", version=2, mount="/cg")
    assert host_facts(proc=proc, root=tmp_path).free_bytes == 0


def test_without_cgroups_the_machine_limits(tmp_path):
    facts = host_facts(proc=tmp_path / "nothing")
    assert facts.limit_bytes == psutil.virtual_memory().total
    assert 0 < facts.free_bytes <= facts.limit_bytes


def test_this_machine():
    facts = host_facts()
    assert 0 < facts.free_bytes <= facts.limit_bytes <= psutil.virtual_memory().total


def test_directory_facts(tmp_path):
    facts = inspect_directory(str(tmp_path))
    assert facts.is_directory
    assert facts.is_writable
    assert not facts.is_read_only
    assert 0 < facts.free_bytes <= os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize
    (tmp_path / "file").write_text("x")
    assert not inspect_directory(str(tmp_path / "file")).is_directory
    with pytest.raises(FileNotFoundError):
        inspect_directory(str(tmp_path / "missing"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    assert not inspect_directory(str(tmp_path)).is_writable


def _kind_of(path: str) -> str:
    """The file system's name by another road than statfs: the longest mount point in mountinfo."""
    best = ("", "")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, tail = line.partition(" - ")
        point = fields.split()[4]
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best[0]):
            best = (point, tail.split()[0])
    return best[1]


@pytest.mark.parametrize("path", ["/dev/shm", "/", tempfile.gettempdir(), "/proc"])
def test_tmpfs_is_told_by_statfs(path):
    if not Path(path).is_dir():
        pytest.skip(f"no {path} here")
    assert inspect_directory(path).is_tmpfs == (_kind_of(path) in ("tmpfs", "ramfs"))


def test_resolve_budget_uses_this_machine(tmp_path):
    resolved = resolve_budget(
        Budget(ssd=f"{tmp_path}:1MiB"),
        device_free_bytes=5,
        device_total_bytes=9,
        device_is_host=False,
    )
    assert resolved.device_bytes == 5
    assert 0 < resolved.host_bytes <= 0.8 * host_facts().limit_bytes
    assert resolved.ssd[0].path == str(tmp_path.resolve())
    with pytest.raises(ConfigError, match="does not exist"):
        resolve_budget(
            Budget(ssd=f"{tmp_path}/no:1MiB"),
            device_free_bytes=5,
            device_total_bytes=9,
            device_is_host=False,
        )


def test_resident_set_and_its_peak_follow_memory():
    before = resident_bytes()
    can_reset = reset_peak_resident()
    block = bytearray(64 * MIB)
    block[::4096] = b"x" * len(block[::4096])
    grown = resident_bytes()
    assert grown - before > 48 * MIB
    assert peak_resident_bytes() >= grown - MIB
    del block
    if can_reset:
        assert reset_peak_resident()
        assert peak_resident_bytes() < grown - 32 * MIB
