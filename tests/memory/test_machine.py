from __future__ import annotations

import os

import pytest

from memopt.memory.machine import num_idle_cpus


@pytest.fixture
def eight_cpus(monkeypatch):
    monkeypatch.setattr("memopt.memory.machine.num_usable_cpus", lambda: 8)
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 7.0, 7.0))


def write(root, files):
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("files", "idle"),
    [
        ({}, 6.5),
        ({"cpu.max": "max 100000\n"}, 6.5),
        ({"cpu.max": "250000 100000\n"}, 1.0),
        ({"cpu.max": "50000 100000\n"}, 0.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 6.5),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.5),
        ({"cpu.max": "not what it should be"}, 6.5),
    ],
)
def test_share_less_load(eight_cpus, tmp_path, files, idle):
    write(tmp_path, files)
    assert num_idle_cpus(tmp_path) == idle


def test_this_machine():
    assert 0 <= num_idle_cpus() <= (os.cpu_count() or 1)
