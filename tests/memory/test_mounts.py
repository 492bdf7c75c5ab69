from __future__ import annotations

import os

import pytest

from memopt.memory.mounts import mount_of

TABLE = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:20 / /dev/shm rw - tmpfs tmpfs rw
24 22 259:1 / /mnt/fast rw,noatime shared:7 master:2 - xfs /dev/nvme0n1p1 rw
25 22 0:40 / /mnt/with\\040space rw - nfs4 host:/export rw
26 24 0:50 / /mnt/fast rw - overlay overlay rw
27 22 0:60 / /home rw - fuse.sshfs me@host:/ rw
broken line
"""


@pytest.fixture
def proc(tmp_path):
    (tmp_path / "mountinfo").write_text(TABLE)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "kind", "source", "device"),
    [
        ("/var/x", "ext4", "/dev/vda", "254:0"),
        ("/dev/shm/a", "tmpfs", "tmpfs", "0:20"),
        ("/mnt/fast", "overlay", "overlay", "0:50"),  # the later mount hides the earlier
        ("/mnt/faster", "ext4", "/dev/vda", "254:0"),  # a name's beginning is no parent
        ("/mnt/with space/b", "nfs4", "host:/export", "0:40"),
    ],
)
def test_the_innermost_mount_holds_a_path(proc, path, kind, source, device):
    mount = mount_of(path, proc=proc)
    assert (mount.kind, mount.source, mount.device) == (kind, source, device)


def test_memory_and_networks_are_told(proc):
    assert mount_of("/dev/shm", proc=proc).is_memory
    assert mount_of("/mnt/with space", proc=proc).is_network
    assert mount_of("/home/me", proc=proc).is_network
    disk = mount_of("/", proc=proc)
    assert not disk.is_memory
    assert not disk.is_network


def test_no_table_and_no_mount(tmp_path):
    with pytest.raises(OSError, match="mountinfo"):
        mount_of("/x", proc=tmp_path)
    (tmp_path / "mountinfo").write_text("23 22 0:20 / /dev/shm rw - tmpfs tmpfs rw\n")
    with pytest.raises(LookupError, match="/x is below no mount"):
        mount_of("/x", proc=tmp_path)


def test_on_this_machine(tmp_path):
    mount = mount_of(os.path.realpath(tmp_path))
    number = os.stat(mount.point).st_dev
    assert mount.device == f"{os.major(number)}:{os.minor(number)}" or mount.kind == "btrfs"
