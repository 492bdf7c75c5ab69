"""Real faults of real file systems: full, failing, read-only, removed, killed. Needs root for the mounts."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from memopt.io import ExtentStore, ExtentStoreFull, create_unlinked, open_engine, open_file
from tests.io.conformance import MIB, on_disk, pages, soon
from tests.io.test_uring import make_engine

EXT4_IOC_SHUTDOWN = 0x8004587D


@pytest.fixture(params=["threads", "io_uring"])
def engine(request):
    engine = (
        open_engine("threads", queue_depth=4)
        if request.param == "threads"
        else make_engine(queue_depth=4)
    )
    yield engine
    with contextlib.suppress(OSError):
        engine.close()


def call(*command: object) -> None:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"{command[0]} is not possible here: {done.stderr.strip()}")


class SmallDisk:
    """A file system of its own, mounted for one test."""

    def __init__(self, where: Path, kind: str, nbytes: int) -> None:
        if os.geteuid() != 0:
            pytest.skip("mounting needs root")
        self.path = where / "mnt"
        self.path.mkdir()
        self.image = where / "image"
        if kind == "tmpfs":
            call("mount", "-t", "tmpfs", "-o", f"size={nbytes}", "none", self.path)
            return
        if shutil.which(f"mkfs.{kind}") is None:
            pytest.skip(f"mkfs.{kind} is not installed")
        with self.image.open("wb") as image:
            image.truncate(nbytes)
        call(f"mkfs.{kind}", "-q", self.image)
        call("mount", "-o", "loop", self.image, self.path)

    def fill(self) -> None:
        """What another process does that takes all the space that is left."""
        subprocess.run(
            [
                "dd",
                "if=/dev/zero",
                f"of={self.path}/other",
                "bs=4k",
                "oflag=append",
                "conv=notrunc",
            ],
            capture_output=True,
            check=False,
        )
        stat = os.statvfs(self.path)
        assert stat.f_bavail * stat.f_frsize < 64 << 10

    def free_bytes(self) -> int:
        stat = os.statvfs(self.path)
        return stat.f_bfree * stat.f_frsize

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.path)], capture_output=True, check=True)


@pytest.fixture
def disk(tmp_path):
    with contextlib.ExitStack() as stack:

        def make(kind: str, nbytes: int = 32 * MIB) -> SmallDisk:
            disk = SmallDisk(tmp_path, kind, nbytes)
            stack.callback(disk.unmount)
            return disk

        yield make


KINDS = pytest.mark.parametrize("kind", ["ext4", "tmpfs"])


@KINDS
def test_budget_larger_than_the_disk_is_refused_before_data_is_lost(disk, engine, kind):
    disk = disk(kind)
    with ExtentStore([(disk.path, 1 << 40)], engine, growth_bytes=4 * MIB) as store:
        kept = []

        def fill() -> None:
            while True:
                extent, data = store.alloc(MIB + 5), pages(MIB + 5)
                store.write(extent, data).wait()
                kept.append((extent, data))

        with pytest.raises(ExtentStoreFull, match="no data was lost") as caught:
            fill()
        assert caught.value.errno == errno.ENOSPC
        assert str(disk.path) in str(caught.value)
        assert len(kept) > 16
        for (
            extent,
            data,
        ) in kept:  # what was accepted is all there, and can be rewritten on the full disk
            back = bytearray(len(data))
            store.read(extent, back).wait()
            assert back == data
            store.write(extent, data).wait()
        for extent, _ in kept[:4]:
            store.free(extent)
        store.write(store.alloc(3 * MIB), pages(3 * MIB)).wait()
    assert disk.free_bytes() > 20 * MIB
    (disk.path / "checkpoint").write_bytes(bytes(8 * MIB))


@KINDS
def test_disk_filled_by_another_process_between_two_writes(disk, engine, kind):
    disk = disk(kind)
    with ExtentStore([(disk.path, 64 * MIB)], engine, growth_bytes=4 * MIB) as store:
        extent, data = store.alloc(2 * MIB), pages(2 * MIB)
        store.write(extent, data).wait()
        disk.fill()
        second = store.alloc(MIB)  # reserved before the disk was full
        store.write(second, data[:MIB]).wait()
        with pytest.raises(ExtentStoreFull, match="No space left"):
            store.alloc(8 * MIB)
        back = bytearray(2 * MIB)
        store.read(extent, back).wait()
        assert back == data
        (disk.path / "other").unlink()
        store.write(store.alloc(8 * MIB), bytes(8 * MIB)).wait()
    disk_is_empty(disk)


def disk_is_empty(disk: SmallDisk) -> None:
    assert [p.name for p in disk.path.iterdir() if p.name != "lost+found"] == []


def test_a_limit_on_the_size_of_files_is_less_room(tmp_path, engine):
    """`ulimit -f`, or 4 GiB of FAT: the budget promises what one file cannot hold."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6 * MIB, before[1]))
    try:
        with ExtentStore([(tmp_path, 64 * MIB)], engine) as store:
            extents = [store.alloc(MIB) for _ in range(6)]
            with pytest.raises(
                ExtentStoreFull, match=r"No file may be larger here \(ulimit -f"
            ) as caught:
                store.alloc(MIB)
            assert caught.value.errno == errno.EFBIG
            data, back = pages(MIB), pages(MIB, fill=bytes(MIB))
            store.write(extents[5], data)
            store.read(extents[5], back).wait()
            assert back == data
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@KINDS
@pytest.mark.parametrize("shift", [0, 1])
def test_write_without_reservation_reports_the_full_disk(disk, engine, kind, shift):
    """The case in which other engines report success: a plain file on a disk that has no room for it."""
    disk = disk(kind)
    with contextlib.closing(open_file(disk.path / "swap", writable=True, create=True)) as file:
        with pytest.raises(OSError, match="write at offset") as caught:
            engine.write(file, 0, pages(64 * MIB, shift=shift)).wait()
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(disk.path / "swap")
        assert 0 <= caught.value.offset < 64 * MIB
        engine.detach(file)


def test_second_directory_takes_what_the_first_disk_refuses(disk, engine, tmp_path):
    disk = disk("tmpfs", 4 * MIB)
    places = [(disk.path, 64 * MIB), (tmp_path, 64 * MIB)]
    with ExtentStore(places, engine, growth_bytes=MIB, stripe_bytes=MIB) as store:
        extent, data = store.alloc(24 * MIB), pages(24 * MIB)
        assert {run.area_index for run in extent.runs} == {0, 1} or {
            run.area_index for run in extent.runs
        } == {1}
        store.write(extent, data).wait()
        back = bytearray(24 * MIB)
        store.read(extent, back).wait()
        assert back == data


def test_failing_device(disk, engine):
    """The disk under the file system loses its blocks: EIO from the device, not an injected one."""
    disk = disk("ext4")
    with ExtentStore([(disk.path, 16 * MIB)], engine, growth_bytes=16 * MIB) as store:
        extent, data = store.alloc(16 * MIB), pages(16 * MIB)
        store.write(extent, data).wait()
        os.truncate(disk.image, 12 * MIB)
        with pytest.raises(OSError, match="read at offset") as caught:
            store.read(extent, pages(16 * MIB)).wait()
        assert caught.value.errno == errno.EIO
        assert str(disk.path) in str(caught.value)
        os.truncate(disk.image, 32 * MIB)


def test_file_system_shuts_down_in_the_middle(disk, engine):
    """ext4 stops after an error of its journal; every later transfer must fail, none may seem to work."""
    disk = disk("ext4")
    store = ExtentStore([(disk.path, 16 * MIB)], engine, growth_bytes=16 * MIB)
    extent, data = store.alloc(4 * MIB), pages(4 * MIB)
    store.write(extent, data).wait()
    root = os.open(disk.path, os.O_RDONLY)
    try:
        fcntl.ioctl(root, EXT4_IOC_SHUTDOWN, (2).to_bytes(4, "little"))
    except OSError as error:
        pytest.skip(f"this ext4 cannot be shut down: {error}")
    finally:
        os.close(root)
    with pytest.raises(OSError, match="write at offset") as caught:
        store.write(extent, pages(4 * MIB)).wait()
    assert caught.value.errno == errno.EIO
    with pytest.raises(OSError, match="write at offset"):  # not the old bytes either
        store.read(extent, pages(4 * MIB))
    store.close()  # nothing left to say: the failure was waited for


def test_read_only_file_system(disk, engine):
    disk = disk("ext4")
    call("mount", "-o", "remount,ro", disk.path)
    with pytest.raises(OSError, match="Read-only") as caught:
        ExtentStore([(disk.path, MIB)], engine)
    assert caught.value.errno == errno.EROFS
    assert str(disk.path) in str(caught.value)


def test_remount_read_only_is_refused_while_extents_are_open(disk, engine):
    """The kernel protects an open spill file; the store works on, and afterwards the remount goes through."""
    disk = disk("ext4")
    remount = ["mount", "-o", "remount,ro", str(disk.path)]
    with ExtentStore([(disk.path, MIB)], engine) as store:
        extent, data = store.alloc(MIB), pages(MIB)
        assert subprocess.run(remount, capture_output=True, check=False).returncode != 0
        store.write(extent, data).wait()
        back = bytearray(MIB)
        store.read(extent, back).wait()
        assert back == data
    assert subprocess.run(remount, capture_output=True, check=False).returncode == 0


def test_removed_directory(tmp_path, engine):
    where = tmp_path / "spill"
    where.mkdir()
    with ExtentStore([(where, 4 * MIB)], engine) as store:
        shutil.rmtree(where)
        extent, data = store.alloc(2 * MIB), pages(2 * MIB)  # the file has no name: it lives on
        store.write(extent, data).wait()
        back = bytearray(2 * MIB)
        store.read(extent, back).wait()
        assert back == data
    with pytest.raises(FileNotFoundError) as caught:
        ExtentStore([(where, 4 * MIB)], engine)
    assert str(where) in str(caught.value)


UNPRIVILEGED = """
import os, sys
from memopt.io import ExtentStore, threads
os.setuid(65534)
try:
    ExtentStore([(sys.argv[1], 1 << 20)], "threads")
except PermissionError as error:
    print(error.errno, error.filename)
"""


def test_unwritable_directory():
    if os.geteuid() != 0:
        pytest.skip("dropping rights needs root")
    with tempfile.TemporaryDirectory() as where:
        Path(where).chmod(0o555)
        done = subprocess.run(
            [sys.executable, "-c", UNPRIVILEGED, where], capture_output=True, text=True, check=True
        )
    assert done.stdout.split() == [str(errno.EACCES), where]


VICTIM = """
import sys, os
from memopt.io import ExtentStore, open_engine
engine = open_engine(sys.argv[2])
store = ExtentStore([(sys.argv[1], 12 << 20)], engine, growth_bytes=1 << 20)
extents = [store.alloc(2 << 20) for _ in range(5)]
print("ready", flush=True)
while True:
    for extent in extents:
        store.write(extent, bytes(2 << 20))
"""


@KINDS
@pytest.mark.parametrize("name", ["threads", "io_uring"])
def test_sigkill_in_the_middle_leaves_no_file_and_no_lost_space(disk, kind, name):
    if name == "io_uring":
        make_engine().close()
    disk = disk(kind)
    before = disk.free_bytes()
    for _ in range(2):
        victim = subprocess.Popen(
            [sys.executable, "-c", VICTIM, str(disk.path), name], stdout=subprocess.PIPE, text=True
        )
        with victim:
            assert victim.stdout.readline() == "ready\n"
            assert before - disk.free_bytes() > 9 * MIB
            victim.send_signal(signal.SIGKILL)
        disk_is_empty(disk)
        assert soon(
            lambda: before - disk.free_bytes() < MIB
        )  # the kernel takes a ring apart a moment later
    with (
        open_engine(name) as engine,
        ExtentStore([(disk.path, 12 * MIB)], engine) as store,
    ):  # starts clean
        extent, data = store.alloc(12 * MIB), pages(12 * MIB)
        store.write(extent, data).wait()
        back = bytearray(12 * MIB)
        store.read(extent, back).wait()
        assert back == data


def test_interrupted_by_signals_all_the_time(tmp_path, engine):
    """A timer fires every millisecond: no call may give up, none may be counted twice."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        with contextlib.closing(create_unlinked(tmp_path)) as file:
            for i in range(20):
                data = pages(2 * MIB, shift=i % 2)
                engine.write(file, 0, data).wait()
                back = pages(2 * MIB)
                engine.read(file, 0, back).wait()
                assert back == data == on_disk(file, 0, 2 * MIB)
            engine.detach(file)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
