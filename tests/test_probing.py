"""Rates that `memopt probe` keeps, and sessions that use them instead of measuring."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import memopt
import memopt._probing as probing
import memopt._resources as resources
from memopt._probing import KeptRates, link_key, probe, ssd_key
from memopt.memory.machine import driver_version
from memopt.memory.probe_cache import ProbeCache
from memopt.types.hardware import Hardware

CPU = torch.device("cpu")
MIB = 1 << 20
MEASURED = Hardware(
    device="cpu",
    name="cpu",
    d2h_bytes_per_s=1.0,
    h2d_bytes_per_s=2.0,
    ssd_write_bytes_per_s=3.0,
    ssd_read_bytes_per_s=4.0,
)
LINK = {
    "d2h_bytes_per_s": 10.0,
    "h2d_bytes_per_s": 20.0,
    "duplex_bytes_per_s": 25.0,
    "page_lock_bytes_per_s": 5.0,
}
SSD = {"write_bytes_per_s": 30.0, "read_bytes_per_s": 40.0}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> ProbeCache:
    """A cache of this test, which sessions find as well."""
    monkeypatch.setenv("MEMOPT_CACHE", str(tmp_path / "cache"))
    return ProbeCache.from_environment()


@pytest.fixture
def spill(tmp_path):
    directory = tmp_path / "spill"
    directory.mkdir()
    return directory


# - Keys


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU, as torch would show it; returns what can be changed of it."""
    facts = SimpleNamespace(name="GPU", uuid="u-1", total_memory=1 << 36, driver="580.65.06")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(probing, "driver_version", lambda: facts.driver)
    return facts


def test_the_links_key_changes_with_gpu_driver_torch_and_cpus(gpu, monkeypatch):
    device = torch.device("cuda", 0)
    keys = [link_key(device)]
    for change in ({"uuid": "u-2"}, {"name": "other"}, {"driver": "590.1"}, {"total_memory": 1}):
        gpu.__dict__.update(change)
        keys.append(link_key(device))
    for target, name, value in (
        (torch, "__version__", "2.99.0"),
        (torch.version, "cuda", "99.0"),
        (probing, "num_usable_cpus", lambda: 7),
        (probing.platform, "node", lambda: "another machine"),
    ):
        monkeypatch.setattr(target, name, value)
        keys.append(link_key(device))
    keys.append(link_key(CPU))
    assert all(a != b for index, a in enumerate(keys) for b in keys[:index])


def test_the_disks_key_changes_with_device_engine_and_company(tmp_path, monkeypatch):
    here = str(tmp_path)
    keys = [
        ssd_key([here], "threads"),
        ssd_key([here], "io_uring"),
        ssd_key([here, here], "threads"),
    ]
    if os.path.isdir("/dev/shm") and os.stat("/dev/shm").st_dev != os.stat(here).st_dev:
        assert ssd_key([here, "/dev/shm"], "threads") == ssd_key(["/dev/shm", here], "threads")
        keys += [ssd_key(["/dev/shm"], "threads"), ssd_key([here, "/dev/shm"], "threads")]
    monkeypatch.setattr(probing, "num_usable_cpus", lambda: 7)
    keys.append(ssd_key([here], "threads"))
    assert all(a != b for index, a in enumerate(keys) for b in keys[:index])
    (tmp_path / "sub").mkdir()
    assert ssd_key([str(tmp_path / "sub")], "threads") == keys[-1]  # the same drive


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (x)\nGCC version: 13",
            "580.65.06",
        ),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12\n", "535.183.01"),
        ("nothing of the kind", ""),
        (None, ""),
    ],
)
def test_the_drivers_version(tmp_path, text, version):
    if text is not None:
        (tmp_path / "driver/nvidia").mkdir(parents=True)
        (tmp_path / "driver/nvidia/version").write_text(text)
    assert driver_version(tmp_path) == version


# - What is kept, over what was measured


@pytest.mark.parametrize("with_link", [False, True])
@pytest.mark.parametrize("with_ssd", [False, True])
def test_kept_rates_replace_measured_ones(cache, spill, with_link, with_ssd):
    if with_link:
        cache.store("link", link_key(CPU), LINK)
    if with_ssd:
        cache.store("ssd", ssd_key([str(spill)], "threads"), SSD)
    kept = KeptRates.find(CPU, [str(spill)], "threads")
    assert kept.complete == (with_link and with_ssd)
    hardware = kept.hardware(None if kept.complete else MEASURED)
    assert hardware.d2h_bytes_per_s == (10.0 if with_link else 1.0)
    assert hardware.duplex_bytes_per_s == (25.0 if with_link else 0.0)
    assert hardware.page_lock_bytes_per_s == (5.0 if with_link else 0.0)
    assert hardware.ssd_write_bytes_per_s == (30.0 if with_ssd else 3.0)
    assert hardware.ssd_read_bytes_per_s == (40.0 if with_ssd else 4.0)
    assert ("kept" in hardware.source) == (with_link or with_ssd)
    assert Hardware.from_dict(hardware.to_dict()) == hardware
    if not (with_link or with_ssd):
        assert hardware == MEASURED


def test_a_directory_that_is_gone_is_a_note(cache, tmp_path):
    kept = KeptRates.find(CPU, [str(tmp_path / "gone")], "threads")
    assert kept.ssd is None
    assert "not looked up" in kept.notes[0]


# - Probing


def test_a_probe_is_kept_until_it_is_asked_to_be_fresh(cache, spill, monkeypatch):
    asked = [(str(spill), 4 * MIB)]
    seen: list[str] = []
    first = probe(CPU, asked, engine="threads", progress=lambda label, share: seen.append(label))
    assert first.link_provenance == first.ssd[0].provenance == "measured now"
    assert first.ssd[0].rates.probed_bytes <= 4 * MIB
    assert first.hardware.ssd_write_bytes_per_s == first.ssd[0].rates.write_bytes_per_s > 0
    assert {"link", "page-locking", str(spill)} <= set(seen)
    assert list(spill.iterdir()) == []
    again = probe(CPU, asked, engine="threads")
    assert "kept by memopt probe" in again.link_provenance
    assert again.ssd[0].rates == first.ssd[0].rates
    assert replace(again.hardware, source="") == replace(first.hardware, source="")
    fresh = probe(CPU, asked, engine="threads", fresh=True)
    assert fresh.ssd[0].provenance == "measured now"
    assert fresh.ssd[0].rates != first.ssd[0].rates
    now = probe(CPU, asked, engine="threads")
    assert now.ssd[0].rates == fresh.ssd[0].rates


def test_several_directories_are_measured_alone_and_together(cache, spill, tmp_path):
    (tmp_path / "second").mkdir()
    paths = [str(spill), str(tmp_path / "second")]
    result = probe(CPU, [(path, 4 * MIB) for path in paths], engine="threads")
    assert [some.paths for some in result.ssd] == [(paths[0],), (paths[1],), tuple(paths)]
    assert result.ssd[1].rates == result.ssd[0].rates  # the same drive: measured once
    together = result.ssd[2].rates
    assert result.hardware.ssd_read_bytes_per_s == together.read_bytes_per_s
    kept = KeptRates.find(CPU, paths[::-1], "threads")
    assert kept.ssd.rates["read_bytes_per_s"] == together.read_bytes_per_s


def test_rates_of_pageable_memory_are_not_kept(cache, gpu, monkeypatch):
    device = torch.device("cuda", 0)
    rates = {name: 1.0 for name in LINK if name != "page_lock_bytes_per_s"}
    locked = {"value": False}
    monkeypatch.setattr(
        probing,
        "measure_link",
        lambda device: probing.LinkRates(**rates, locked=locked["value"], reason="refused"),
    )
    monkeypatch.setattr(
        probing,
        "measure_page_locking",
        lambda device, nbytes: probing.LockRate(bytes_per_s=2.0 * locked["value"], nbytes=nbytes),
    )
    monkeypatch.setattr(probing, "device_name", lambda device: "GPU")
    result = probe(device, [])
    assert any("are not kept" in note for note in result.notes)
    assert KeptRates.find(device, [], "").link is None
    locked["value"] = True
    probe(device, [])
    assert KeptRates.find(device, [], "").link.rates["page_lock_bytes_per_s"] == 2.0


# - Sessions


def train(spill) -> tuple[memopt.RunReport, Hardware]:
    """Return the report and the rates that the planner was given."""
    given = []
    find = resources.Resources.hardware
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)))
    spec = memopt.Budget(ssd=f"{spill}:32MiB")
    with (
        pytest.MonkeyPatch.context() as patch,
        memopt.optimize(model, budget=spec, engine="threads") as run,
    ):
        patch.setattr(
            resources.Resources, "hardware", lambda self: given.append(find(self)) or given[-1]
        )
        for _ in range(3):
            model(torch.randn(512, 64)).sum().backward()
    return run.report(), given[0]


def test_a_session_uses_what_is_kept_and_says_so(cache, spill, monkeypatch):
    probed = probe(CPU, [(str(spill), 4 * MIB)], engine="threads")

    def refuse(*arguments):
        raise AssertionError("measured although everything is kept")

    monkeypatch.setattr(resources, "measure_hardware", refuse)
    report, hardware = train(spill)
    notes = [note for note in report.notes if "transfer rates" in note]
    assert len(notes) == 1
    assert notes[0].count("kept by memopt probe") == 2
    assert hardware.ssd_write_bytes_per_s == probed.hardware.ssd_write_bytes_per_s
    assert "kept by memopt probe" in hardware.source


def test_a_session_measures_only_what_is_not_kept(cache, spill, monkeypatch):
    cache.store("ssd", ssd_key([str(spill)], "threads"), SSD)
    stores = []
    measure = resources.measure_hardware

    def watch(device, host, store):
        stores.append(store)
        return measure(device, host, store)

    monkeypatch.setattr(resources, "measure_hardware", watch)
    report, hardware = train(spill)
    assert stores == [None]
    assert hardware.ssd_write_bytes_per_s == 30.0
    assert hardware.d2h_bytes_per_s > 1e6
    assert any("link measured; SSD kept" in note for note in report.notes)


def test_without_a_cache_a_session_measures_and_says_nothing(spill, monkeypatch):
    assert os.environ["MEMOPT_CACHE"] == "off"
    report, hardware = train(spill)
    assert hardware.source == "measured"
    assert not any("transfer rates" in note for note in report.notes)


def test_a_damaged_cache_is_measured_over_and_noted(cache, spill):
    path = cache.store("link", link_key(CPU), LINK)
    path.write_text("{")
    report, hardware = train(spill)
    assert hardware.source == "measured"
    assert any(str(path) in note and "is ignored" in note for note in report.notes)


def test_a_session_keeps_nothing(cache, spill):
    train(spill)
    assert not cache.directory.exists()
