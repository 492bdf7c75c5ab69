"""Checks of I/O engines, spill directories and the probe's cache: with systems that are made up."""

from __future__ import annotations

import os

import pytest

import memopt.io
from memopt.cli.checks import storage
from memopt.cli.checks.base import Check, Context, Status
from memopt.cli.checks.storage import drift, judge_cache, judge_directory, uring_todo
from memopt.types.errors import IoEngineUnavailable

GIB = 1 << 30


def one(checks) -> Check:
    (check,) = checks
    assert bool(check.todo) == (check.status in ("weak", "broken"))
    return check


# - Engines


def test_io_uring_is_tried_with_a_real_block():
    try:
        memopt.io.open_engine("io_uring").close()
    except IoEngineUnavailable as error:
        pytest.skip(str(error))
    check = one(storage.engines(Context()))
    assert check.status == "ok"
    assert check.figures["io_uring"] is True
    assert "a memory file" in check.found


def test_the_block_is_written_where_the_bytes_will_go(tmp_path, monkeypatch):
    asked = []
    open_engine = memopt.io.open_engine

    def watch(engine="auto", *, directory=None, **more):
        asked.append((engine, directory))
        return open_engine("threads", **more)

    monkeypatch.setattr(memopt.io, "open_engine", watch)
    check = one(storage.engines(Context(ssd=["/no/such/place", f"{tmp_path}:1MiB"])))
    assert asked == [("io_uring", str(tmp_path))]
    assert str(tmp_path) in check.found


@pytest.fixture
def no_uring(monkeypatch):
    open_engine = memopt.io.open_engine

    def refuse(engine="auto", **more):
        if engine == "io_uring":
            raise IoEngineUnavailable(
                "io_uring: Operation not permitted: a container's seccomp profile forbids it"
            )
        return open_engine(engine, **more)

    monkeypatch.setattr(memopt.io, "open_engine", refuse)


def test_without_io_uring_the_threads_are_tried(no_uring, tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text("Name:\tx\nSeccomp:\t2\n")
    check = one(storage.engines(Context(root=tmp_path)))
    assert check.status == "weak"
    assert "Operation not permitted" in check.found
    assert "seccomp profile" in check.todo
    assert check.figures["seccomp"] == "2"


def test_no_engine_at_all_is_broken(no_uring, monkeypatch):
    def fail(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pwritev", fail)
    monkeypatch.setattr(os, "preadv", fail)
    check = one(storage.engines(Context()))
    assert check.status == "broken"
    assert "threads: " in check.found


@pytest.mark.parametrize(
    ("reason", "disabled", "word"),
    [
        ("io_uring: the native part of memopt is missing (No module)", None, "liburing-dev"),
        ("io_uring: the runtime of cffi is missing (No module)", None, "--force-reinstall cffi"),
        ("io_uring: Operation not permitted: ... seccomp ...", "2", "kernel.io_uring_disabled=0"),
        ("io_uring: Operation not permitted: ... seccomp ...", "0", "seccomp profile"),
        ("io_uring: Function not implemented: this kernel has no io_uring", None, "Linux 5.6"),
        ("io_uring: a test block failed: Input/output error", None, "test block"),
    ],
)
def test_each_reason_has_its_remedy(reason, disabled, word):
    assert word in uring_todo(reason, disabled)


# - Directories

GOOD = {
    "path": "/mnt/nvme",
    "free_bytes": 500 * GIB,
    "is_memory": False,
    "file_system": "ext4",
    "source": "/dev/nvme0n1p1",
    "is_network": False,
    "rotational": False,
    "direct": True,
    "direct_reason": "",
    "memory_align_bytes": 4,
    "offset_align_bytes": 512,
    "engine": "io_uring",
    "queue_depth": 32,
    "write_bytes_per_s": 3.1e9,
    "read_bytes_per_s": 6.9e9,
    "probed_bytes": GIB,
}


def test_a_good_directory():
    check = judge_directory("SSD /mnt/nvme", GOOD)
    assert check.status == "ok"
    assert check.found == (
        "ext4 on /dev/nvme0n1p1, 500 GiB free, O_DIRECT aligned to 4 (memory) and 512 bytes (offset), "
        "write 3.1 GB/s, read 6.9 GB/s (io_uring, 32 blocks in flight)"
    )


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"is_memory": True, "file_system": "tmpfs"}, "this is memory"),
        ({"is_network": True, "file_system": "nfs4"}, "network"),
        ({"file_system": "overlay"}, "docker run -v"),
        ({"direct": False, "direct_reason": "O_DIRECT is refused"}, "page cache"),
        ({"free_bytes": GIB}, "little space"),
        ({"write_bytes_per_s": 90e6}, "slower than a SATA SSD"),
        ({"read_bytes_per_s": 90e6}, "slower than a SATA SSD"),
    ],
)
def test_each_weak_point_has_its_remedy(change, word):
    check = judge_directory("SSD", {**GOOD, **change})
    assert check.status == "weak"
    assert word in check.todo


def test_a_real_directory_is_measured_and_left_empty(tmp_path):
    context = Context(ssd=[f"{tmp_path}:8MiB"])
    check = one(storage.directories(context))
    assert check.status in ("ok", "weak")
    figures = check.figures
    assert figures["free_bytes"] > 0
    assert figures["direct"] == bool(figures["memory_align_bytes"])
    assert 0 < figures["probed_bytes"] <= 8 << 20
    assert context.measured[f"write {tmp_path}"] == figures["write_bytes_per_s"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no /dev/shm")
def test_memory_is_told():
    check = one(storage.directories(Context(ssd=["/dev/shm:4MiB"])))
    assert check.status == "weak"
    assert check.figures["file_system"] == "tmpfs"
    assert "this is memory" in check.todo


@pytest.mark.parametrize("request_", ["/no/such/place", "/no/such/place:1GiB", "/:24G"])
def test_a_directory_that_cannot_be_used_is_broken(request_):
    check = one(storage.directories(Context(ssd=[request_], quick=True)))
    assert check.status == "broken"
    assert request_.rpartition(":")[0] in check.found


def test_a_disk_that_fails_is_broken_and_the_next_directory_is_looked_at(tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    create = memopt.io.create_unlinked

    def fail(path, **more):
        if path == str(first):
            raise OSError(30, "Read-only file system", path)
        return create(path, **more)

    monkeypatch.setattr(memopt.io, "create_unlinked", fail)
    found = storage.directories(Context(ssd=[str(first), str(second)], quick=True))
    assert [check.status == "broken" for check in found] == [True, False]
    assert "Read-only file system" in found[0].found


def test_whether_a_drive_spins_is_asked_of_it_or_of_its_parent(tmp_path):
    drive = tmp_path / "sys/devices/disk"
    (drive / "queue").mkdir(parents=True)
    (drive / "queue/rotational").write_text("1\n")
    (drive / "part1").mkdir()
    block = tmp_path / "sys/dev/block"
    block.mkdir(parents=True)
    os.symlink(drive, block / "8:0")
    os.symlink(drive / "part1", block / "8:1")
    context = Context(root=tmp_path)
    assert storage._rotational("8:0", context) is True
    assert storage._rotational("8:1", context) is True
    assert storage._rotational("8:2", context) is None


# - The cache


def test_a_cache_that_is_off(monkeypatch):
    monkeypatch.setenv("MEMOPT_CACHE", "off")
    check = one(storage.cache(Context()))
    assert (check.status, "MEMOPT_CACHE=off" in check.found) == ("absent", True)


KEPT = {
    "directory": "/c",
    "writable": True,
    "link": "/c/link-1.json",
    "ssd": "/c/ssd-1.json",
    "drift": {"d2h_bytes_per_s": 0.02},
    "notes": [],
}


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({}, "ok", ""),
        (
            {"drift": {"d2h_bytes_per_s": -0.4, "write /a": 0.1}},
            "weak",
            "memopt probe --ssd /a --fresh",
        ),
        ({"notes": ["probe cache /c/x is ignored: damaged"]}, "weak", "delete that file"),
        ({"writable": False}, "weak", "MEMOPT_CACHE"),
        ({"link": None, "ssd": None}, "absent", ""),
        ({"ssd": None}, "ok", ""),
    ],
)
def test_the_cache_is_judged(change, status: Status, word):
    check = judge_cache({**KEPT, **change}, ["/a"])
    assert check.status == status
    assert word in check.todo
    assert bool(check.todo) == bool(word)


def test_drift_is_of_what_is_known_twice():
    kept = {"d2h": 50.0, "h2d": 10.0, "write": 0.0}
    assert drift(kept, {"d2h": 40.0, "write": 3.0, "read": 1.0}) == {"d2h": pytest.approx(-0.2)}


def test_the_doctor_sees_what_a_probe_kept(tmp_path, monkeypatch):
    import torch

    from memopt._probing import link_key
    from memopt.memory.probe_cache import ProbeCache

    monkeypatch.setenv("MEMOPT_CACHE", str(tmp_path / "cache"))
    empty = one(storage.cache(Context()))
    assert empty.status == "absent"
    assert empty.figures["writable"] is True
    assert not (tmp_path / "cache").exists()
    rates = dict.fromkeys(
        ("d2h_bytes_per_s", "h2d_bytes_per_s", "duplex_bytes_per_s", "page_lock_bytes_per_s"), 1e9
    )
    ProbeCache.from_environment().store("link", link_key(torch.device("cpu")), rates)
    kept = one(storage.cache(Context(measured={"d2h_bytes_per_s": 2e9})))
    assert kept.status == "weak"
    assert "+100%" in kept.found
    assert one(storage.cache(Context())).status == "ok"
