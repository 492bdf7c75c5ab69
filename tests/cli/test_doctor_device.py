"""Checks of the device: with GPUs that are made up; real ones are in test_doctor_gpu.py."""

from __future__ import annotations

import pytest
import torch

from memopt.cli.checks import device
from memopt.cli.checks.base import Check, Context, Gpu
from memopt.cli.checks.device import judge_attention, judge_link, pcie_facts, raw_rate

GIB = 1 << 30
GPU = Gpu(
    index=0,
    name="H",
    total_bytes=80 * GIB,
    free_bytes=79 * GIB,
    capability="9.0",
    pci="0000:1b:00.0",
)
NO_PCIE = {"lanes": None, "max_lanes": None, "speed": None, "raw_bytes_per_s": None}


def one(checks) -> Check:
    (check,) = checks
    assert bool(check.todo) == (check.status in ("weak", "broken"))
    return check


def pci(root, **files):
    place = root / "sys/bus/pci/devices" / GPU.pci
    place.mkdir(parents=True)
    for name, text in files.items():
        (place / name).write_text(text + "\n")
    return Context(root=root, gpus=[GPU], quick=True)


# - Is there a device


@pytest.mark.parametrize(
    ("driver", "problem", "status", "word"),
    [
        ("", "torch 2.13.0+cpu is built without CUDA", "absent", ""),
        ("", "Found no NVIDIA driver on your system", "absent", ""),
        ("proc/driver/nvidia/version", "torch is built without CUDA", "weak", "a CUDA build"),
        ("dev/nvidiactl", "The NVIDIA driver on your system is too old", "broken", "an update"),
        ("dev/dxg", "", "broken", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_why_there_is_no_device(tmp_path, driver, problem, status, word):
    if driver:
        sign = tmp_path / driver
        sign.parent.mkdir(parents=True)
        sign.write_text("NVRM version: 580.65.06")
    check = one(device.devices(Context(root=tmp_path, gpu_problem=problem)))
    assert check.status == status
    assert word in check.todo
    if driver and problem:
        assert problem in check.found


def test_this_machine_finds_devices_or_says_why_not():
    gpus, problem = device.find_gpus()
    assert bool(gpus) == torch.cuda.is_available()
    assert bool(problem) != bool(gpus)


def test_a_free_gpu_and_a_crowded_one():
    check = one(device.devices(Context(gpus=[GPU])))
    assert check.status == "ok"
    assert check.found == "H, 79.0 GiB of 80.0 GiB free, compute 9.0"
    crowded = Gpu(**{**GPU.__dict__, "free_bytes": 60 * GIB})
    check = one(device.devices(Context(gpus=[crowded])))
    assert check.status == "weak"
    assert "20.0 GiB are in use by others" in check.todo


# - The link


@pytest.mark.parametrize(
    ("speed", "lanes", "gbytes"),
    [
        ("2.5 GT/s PCIe", 16, 4.0),
        ("8.0 GT/s PCIe", 16, 15.75),
        ("16.0 GT/s PCIe", 8, 15.75),
        ("32.0 GT/s PCIe", 16, 63.0),
        ("64.0 GT/s PCIe", 16, 128.0),
        ("Unknown", 16, None),
        (None, 16, None),
        ("16.0 GT/s PCIe", None, None),
    ],
)
def test_a_links_raw_rate(speed, lanes, gbytes):
    rate = raw_rate(speed, lanes)
    assert rate is None if gbytes is None else rate == pytest.approx(gbytes * 1e9, rel=0.002)


def test_lanes_are_read_without_measuring(tmp_path):
    context = pci(
        tmp_path, max_link_speed="32.0 GT/s PCIe", current_link_width="16", max_link_width="16"
    )
    check = one(device.links(context))
    assert check.status == "ok"
    assert "16 lanes of 32.0 GT/s PCIe: 63 GB/s raw" in check.found


def test_missing_lanes_are_weak(tmp_path):
    context = pci(
        tmp_path, max_link_speed="16.0 GT/s PCIe", current_link_width="4", max_link_width="16"
    )
    check = one(device.links(context))
    assert check.status == "weak"
    assert "only 4 of 16 lanes" in check.todo


@pytest.mark.parametrize("width", ["0", "x", ""])
def test_what_the_system_does_not_tell(tmp_path, width):
    context = pci(tmp_path, max_link_speed="Unknown", current_link_width=width)
    assert pcie_facts(context, GPU) == {**NO_PCIE, "speed": "Unknown"}
    assert one(device.links(context)).found == "not measured (--quick)"
    assert pcie_facts(context, Gpu(**{**GPU.__dict__, "pci": ""})) == NO_PCIE


GEN5 = {"lanes": 16, "max_lanes": 16, "speed": "32.0 GT/s PCIe", "raw_bytes_per_s": 63e9}


@pytest.mark.parametrize(
    ("rates", "pcie", "locked", "word"),
    [
        ((55e9, 54e9, 100e9), GEN5, True, ""),
        ((55e9, 54e9, 100e9), NO_PCIE, True, ""),
        ((25e9, 54e9, 60e9), GEN5, True, "slower than such a link"),
        ((55e9, 25e9, 60e9), GEN5, True, "slower than such a link"),
        ((6e9, 6e9, 9e9), NO_PCIE, True, "slower than such a link"),
        ((6e9, 6e9, 9e9), GEN5, False, "pageable"),
        ((25e9, 25e9, 45e9), {**GEN5, "lanes": 8, "raw_bytes_per_s": 31.5e9}, True, "only 8 of 16"),
    ],
)
def test_the_link_is_judged_by_what_it_could_give(rates, pcie, locked, word):
    check = judge_link(GPU, rates, pcie, locked=locked)
    assert check.status == ("weak" if word else "ok")
    assert word in check.todo
    assert check.figures["h2d_bytes_per_s"] == rates[1]
    assert "both at once" in check.found


def test_a_measured_link_is_remembered_for_the_caches_check(tmp_path, monkeypatch):
    import memopt.memory.rates as rates

    link = rates.LinkRates(
        d2h_bytes_per_s=50e9, h2d_bytes_per_s=51e9, duplex_bytes_per_s=90e9, locked=True
    )
    monkeypatch.setattr(rates, "measure_link", lambda device: link)
    context = Context(root=tmp_path, gpus=[GPU])
    assert one(device.links(context)).status == "ok"
    assert context.measured == {"d2h_bytes_per_s": 50e9, "h2d_bytes_per_s": 51e9}


def test_without_a_device_copies_in_memory_are_measured():
    check = one(device.links(Context()))
    assert check.status == "absent"
    assert check.figures["memcpy_bytes_per_s"] > 1e8


# - Attention

SEEN = {
    "version": 91002,
    "enabled": True,
    "accepted": {"bfloat16": [64, 96, 128], "float16": [64, 96, 128]},
    "tried": {"bfloat16 64": "", "bfloat16 256": ""},
    "flash_enabled": True,
}


@pytest.mark.parametrize(
    ("change", "status", "found", "todo"),
    [
        ({}, "ok", "forward and backward run for bfloat16 64, bfloat16 256", ""),
        ({"tried": {}}, "ok", "head dimensions 64, 96, 128 in bfloat16", ""),
        ({"tried": {"bfloat16 64": "", "bfloat16 256": "No kernel."}}, "ok", "fails for bfloat16 256 (No", ""),
        ({"tried": {"bfloat16 64": "No available kernel."}}, "weak", "No available kernel.", "newer GPU"),
        ({"accepted": {"bfloat16": [], "float16": []}, "tried": {}}, "weak", "accepts no head", "newer GPU"),
        ({"enabled": False}, "weak", "cuDNN 91002", "enable_cudnn_sdp(True)"),
    ],
)  # fmt: skip
def test_attention_is_judged_by_what_ran(change, status, found, todo):
    check = judge_attention({**SEEN, **change})
    assert check.status == status
    assert found in check.found
    assert todo in check.todo
    assert bool(check.todo) == bool(todo)


def test_without_a_device_attention_is_not_tried():
    assert one(device.attention(Context())).status == "absent"


def test_torch_without_cudnn_is_weak(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    check = one(device.attention(Context(gpus=[GPU])))
    assert check.status == "weak"
