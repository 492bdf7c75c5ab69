"""Checks of host memory, page-locking, NUMA, software: with machines that are made up."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from memopt.cli.checks import host, software
from memopt.cli.checks.base import Check, Context, Gpu
from memopt.cli.checks.host import parse_cpulist
from tests.memory.test_host import fake_proc, write_cgroup

GIB = 1 << 30
GPU = Gpu(
    index=0,
    name="GPU",
    total_bytes=80 * GIB,
    free_bytes=79 * GIB,
    capability="9.0",
    pci="0000:1b:00.0",
)


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text + "\n")


def one(checks) -> Check:
    (check,) = checks
    assert bool(check.todo) == (check.status in ("weak", "broken"))
    return check


# - Memory


@pytest.fixture
def machine(monkeypatch):
    """A machine of 64 GiB with 60 available."""
    import psutil

    facts = SimpleNamespace(total=64 * GIB, available=60 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: facts)
    return facts


def in_cgroup(tmp_path, *, limit, used, version):
    mount = tmp_path / "sys/fs/cgroup"
    write_cgroup(mount / "job", limit=limit, used=used, inactive=0, version=version)
    (tmp_path / "proc").mkdir()
    proc = fake_proc(tmp_path / "proc", path="/job", version=version, mount="/sys/fs/cgroup")
    proc.rename(tmp_path / "proc/self")
    return Context(root=tmp_path)


@pytest.mark.parametrize("version", [1, 2])
def test_the_cgroups_limit_and_what_is_left(tmp_path, machine, version):
    check = one(host.memory(in_cgroup(tmp_path, limit=16 * GIB, used=4 * GIB, version=version)))
    assert check.status == "ok"
    assert (
        check.found == f"cgroup v{version} allows 16.0 GiB of the machine's 64.0 GiB, 12.0 GiB left"
    )
    assert check.figures["free_bytes"] == 12 * GIB


def test_a_nearly_full_cgroup_is_weak(tmp_path, machine):
    check = one(host.memory(in_cgroup(tmp_path, limit=16 * GIB, used=15 * GIB, version=2)))
    assert check.status == "weak"
    assert "raise the memory limit" in check.todo


def test_no_limit_and_no_cgroup(tmp_path, machine):
    check = one(host.memory(in_cgroup(tmp_path, limit="max", used=GIB, version=2)))
    assert check.found == "cgroup v2 sets no limit; the machine has 64.0 GiB, 60.0 GiB left"
    check = one(host.memory(Context(root=tmp_path / "nothing")))
    assert check.found == "no cgroup seen; the machine has 64.0 GiB, 60.0 GiB left"
    assert check.status == "ok"


# - Page-locking


@pytest.fixture
def locking(monkeypatch):
    """Page-locking that answers as told; returns the answer, and what was asked."""
    import memopt.memory.rates as rates

    answer = SimpleNamespace(reason="", bytes_per_s=8e9, asked=[])

    def measure(device, nbytes):
        answer.asked.append((str(device), nbytes))
        return rates.LockRate(
            bytes_per_s=0.0 if answer.reason else answer.bytes_per_s,
            nbytes=nbytes,
            reason=answer.reason,
        )

    monkeypatch.setattr(rates, "measure_page_locking", measure)
    monkeypatch.setattr(host, "_memlock_limits", lambda: (8 << 20, None))
    return answer


def test_page_locking_is_tried(locking, tmp_path):
    check = one(host.page_locking(Context(root=tmp_path, gpus=[GPU])))
    assert check.status == "ok"
    assert check.found == "256 MiB locked at 8 GB/s (RLIMIT_MEMLOCK limit 8.00 MiB)"
    assert locking.asked == [("cuda:0", 256 << 20)]
    quick = one(host.page_locking(Context(root=tmp_path, gpus=[GPU], quick=True)))
    assert quick.found == "4.00 MiB locked (RLIMIT_MEMLOCK limit 8.00 MiB)"


def test_a_refusal_is_weak_with_its_reason(locking, tmp_path):
    locking.reason = "page-locking 4194304 bytes failed: cudaErrorMemoryAllocation"
    check = one(host.page_locking(Context(root=tmp_path, gpus=[GPU])))
    assert check.status == "weak"
    assert "cudaErrorMemoryAllocation" in check.found
    assert "ulimit -l unlimited" in check.todo
    assert check.figures["locked_bytes"] == 0


def test_wsl_is_weak_even_where_a_little_can_be_locked(locking, tmp_path):
    write(tmp_path, "proc/sys/kernel/osrelease", "5.15.167.4-microsoft-standard-WSL2")
    check = one(host.page_locking(Context(root=tmp_path, gpus=[GPU])))
    assert check.status == "weak"
    assert check.figures["wsl"] is True
    assert "WSL" in check.todo


def test_without_a_gpu_nothing_is_locked(locking, tmp_path):
    check = one(host.page_locking(Context(root=tmp_path)))
    assert check.status == "absent"
    assert locking.asked == []
    assert check.figures["memlock_soft_bytes"] == 8 << 20


def test_the_real_limits():
    for limit in host._memlock_limits():
        assert limit is None or limit >= 0


# - NUMA


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0-3,8,10-11", {0, 1, 2, 3, 8, 10, 11}), ("5", {5}), ("", set()), ("\n", set())],
)
def test_cpu_lists(text, numbers):
    assert parse_cpulist(text) == numbers


@pytest.fixture
def two_nodes(tmp_path):
    for node, cpus in enumerate(("0-3", "4-7")):
        write(tmp_path, f"sys/devices/system/node/node{node}/cpulist", cpus)
    write(tmp_path, f"sys/bus/pci/devices/{GPU.pci}/numa_node", "1")
    write(tmp_path, "proc/self/status", "Name:\tpython\nMems_allowed_list:\t0-1\nSeccomp:\t2")
    return tmp_path


@pytest.mark.parametrize(
    ("cpus", "status", "text"),
    [
        ({0, 1}, "weak", "GPU on node 1; 0 of the 2 CPUs"),
        ({3, 4}, "ok", "GPU on node 1; 1 of the 2 CPUs"),
        (set(range(8)), "ok", "GPU on node 1; 4 of the 8 CPUs"),
    ],
)
def test_cpus_far_from_the_gpu_are_weak(two_nodes, monkeypatch, cpus, status, text):
    monkeypatch.setattr(host, "_allowed_cpus", lambda: frozenset(cpus))
    check = one(host.numa(Context(root=two_nodes, gpus=[GPU])))
    assert check.status == status
    assert text in check.found
    assert check.figures["mems_allowed"] == "0-1"
    if status == "weak":
        assert "--cpunodebind=1 --membind=1" in check.todo


@pytest.mark.parametrize("told", ["-1", None, "7"])
def test_a_gpu_whose_node_is_not_told(two_nodes, told):
    path = f"sys/bus/pci/devices/{GPU.pci}/numa_node"
    (two_nodes / path).unlink() if told is None else write(two_nodes, path, told)
    check = one(host.numa(Context(root=two_nodes, gpus=[GPU])))
    assert check.status == "absent"
    assert "does not say" in check.found


def test_one_node_and_none(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "_allowed_cpus", lambda: frozenset({0}))
    assert one(host.numa(Context(root=tmp_path, gpus=[GPU]))).status == "absent"
    write(tmp_path, "sys/devices/system/node/node0/cpulist", "0-3")
    check = one(host.numa(Context(root=tmp_path, gpus=[GPU])))
    assert check.status == "ok"
    assert check.found == "1 node; 1 CPU on node 0 may be used"


# - Software


def test_versions_name_what_takes_part():
    check = one(software.versions(Context()))
    assert check.status == "ok"
    for name in ("memopt", "python", "torch", "kernel"):
        assert f"{name} {check.figures[name]}" in check.found


@pytest.mark.parametrize(
    ("python", "torch", "word"),
    [
        ((3, 10), "2.11.0+cu130", ""),
        ((3, 12), "3.0.1", ""),
        ((3, 9), "2.13.0", "Python 3.10"),
        ((3, 11), "2.10.2", "torch 2.11"),
        ((3, 11), "1.13.1", "torch 2.11"),
    ],
)
def test_what_is_too_old_is_told(python, torch, word):
    assert word in software._too_old(python, torch)
    assert bool(software._too_old(python, torch)) == bool(word)


def test_the_oldest_versions_are_those_of_the_package():
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    assert f'requires-python = ">={".".join(map(str, software.MIN_PYTHON))}"' in text
    assert f'"torch>={".".join(map(str, software.MIN_TORCH))}"' in text
    required = re.search(r"^dependencies = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)[1]
    names = set(re.findall(r'"([a-z]+)', required))
    assert names == {"torch", *software.REQUIRED}


def test_a_missing_package_is_broken(monkeypatch):
    version_of = software._version_of
    monkeypatch.setattr(
        software, "_version_of", lambda name: None if name in ("pulp", "peft") else version_of(name)
    )
    check = one(software.packages(Context()))
    assert check.status == "broken"
    assert check.todo == "pip install pulp"
    assert "not installed: " in check.found
    assert "peft" in check.found.partition("not installed: ")[2]


def test_kernels_are_needed_with_a_gpu_only(monkeypatch):
    from memopt.ops import native

    status = native.CudaStatus(available=False, loaded=False, path="", build="", reason="not built")
    monkeypatch.setattr(native, "cuda_status", lambda: status)
    assert one(software.kernels(Context())).status == "absent"
    check = one(software.kernels(Context(gpus=[GPU])))
    assert check.status == "weak"
    assert "not built" in check.found
    good = native.CudaStatus(available=True, loaded=True, path="/x.so", build="CUDA 13", reason="")
    monkeypatch.setattr(native, "cuda_status", lambda: good)
    assert one(software.kernels(Context(gpus=[GPU]))).found == "/x.so (CUDA 13)"


@pytest.mark.parametrize(
    ("libc", "maps", "gpus", "status"),
    [
        ("glibc", "", [], "ok"),
        ("glibc", "7f00 r-xp 0 08:01 5 /usr/lib/x86_64-linux-gnu/libjemalloc.so.2", [], "weak"),
        ("glibc", "7f00 r-xp 0 08:01 5 /usr/lib/libtcmalloc_minimal.so.4", [GPU], "absent"),
        ("", "", [], "weak"),
    ],
)
def test_malloc(tmp_path, monkeypatch, libc, maps, gpus, status):
    monkeypatch.setattr(software.platform, "libc_ver", lambda: (libc, "2.36"))
    write(tmp_path, "proc/self/maps", maps)
    check = one(software.malloc(Context(root=tmp_path, gpus=gpus)))
    assert check.status == status
    if maps:
        assert "malloc: freed CPU tensors" in check.found or "malloc_minimal" in check.found
