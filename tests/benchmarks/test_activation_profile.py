"""What a trace of the profiler is summed up to, on a small one written by hand."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def profile(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    return importlib.import_module("_activation_profile")


def event(cat, name, begin_us, length_us, stream=7, **args):
    return {
        "ph": "X", "cat": cat, "name": name, "ts": begin_us, "dur": length_us,
        "args": {"stream": stream} | args,
    }  # fmt: skip


TRACE = [
    {"ph": "M", "name": "process_name", "args": {}},
    event("cpu_op", "aten::mm", 0, 5000),
    event("kernel", "gemm", 1000, 400),
    event("kernel", "gemm", 1400, 600),
    event("kernel", "norm", 3000, 100),  # 1 ms idle before it
    event("kernel", "norm", 3150, 100),  # 50 us: a launch
    event("kernel", "other stream", 1000, 50, stream=9),
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 1200, 1000, stream=20, bytes=50_000_000),
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 2200, 1000, stream=20, bytes=50_000_000),
    event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 2500, 500, stream=21, bytes=20_000_000),
]


def test_the_compute_streams_kernels_and_gaps(profile):
    found = profile.summary(TRACE)
    assert found["device_s"] == pytest.approx(2250e-6)
    assert found["kernel_s"] == pytest.approx(1200e-6)
    assert found["idle"]["total_s"] == pytest.approx(1050e-6)
    assert found["idle"]["long_s"] == pytest.approx(1000e-6)
    assert found["idle"]["at_and_length_s"] == [pytest.approx((1000e-6, 1000e-6))]


def test_copies_by_direction(profile):
    copies = profile.summary(TRACE)["copies"]
    out = copies["Memcpy DtoH (Device -> Pinned)"]
    assert (out["num"], out["bytes"]) == (2, 100_000_000)
    assert out["busy_s"] == pytest.approx(2e-3)
    assert out["bytes_per_s"] == pytest.approx(50e9)
    assert copies["Memcpy HtoD (Pinned -> Device)"]["bytes_per_s"] == pytest.approx(40e9)


def test_kernels_heaviest_first(profile):
    kernels = profile.summary(TRACE)["kernels"]
    assert [(k["name"], k["num"]) for k in kernels] == [
        ("gemm", 2),
        ("norm", 2),
        ("other stream", 1),
    ]
    assert kernels[0]["median_s"] == pytest.approx(500e-6)


def test_a_step_without_device_work(profile):
    assert profile.summary([event("cpu_op", "aten::mm", 0, 5)]) == {"device_s": 0.0}
