"""`memopt doctor` and `memopt probe` on a real GPU: under 20 seconds together."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import memopt
from memopt._probing import KeptRates, link_key, probe
from memopt.cli import main
from memopt.cli.checks import device, host, software
from memopt.cli.checks.base import Context
from memopt.cli.doctor import make_context
from memopt.memory.rates import measure_link, measure_page_locking
from tests.cli.test_doctor import validate

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def context() -> Context:
    return make_context((), quick=False)


def test_the_gpu_is_found_with_its_place_on_the_bus(context):
    gpu = context.gpus[0]
    assert context.gpu_problem == ""
    assert gpu.name == torch.cuda.get_device_name(0)
    assert gpu.total_bytes >= gpu.free_bytes > 0
    domain, bus, last = gpu.pci.split(":")
    assert (len(domain), len(bus), len(last)) in ((4, 2, 4), (8, 2, 4))
    assert int(bus, 16) == torch.cuda.get_device_properties(0).pci_bus_id


def test_the_link_is_measured_each_way_and_both(context):
    before = torch.cuda.memory_allocated()
    rates = measure_link(CUDA)
    assert torch.cuda.memory_allocated() == before
    assert rates.locked, rates.reason
    for rate in (rates.d2h_bytes_per_s, rates.h2d_bytes_per_s):
        assert 1e9 < rate < 1e12
        # Both directions share at worst one of them, and at best have one each.
        assert 0.9 * rate < rates.duplex_bytes_per_s
    assert rates.duplex_bytes_per_s < 1.1 * (rates.d2h_bytes_per_s + rates.h2d_bytes_per_s)


def test_page_locking_is_measured():
    rate = measure_page_locking(CUDA, 256 << 20)
    assert rate.reason == ""
    assert 0.1e9 < rate.bytes_per_s < 1e12


def test_every_device_check_gives_an_answer(context):
    answers = [
        check
        for question in (
            software.versions,
            device.devices,
            device.links,
            device.attention,
            software.kernels,
            host.page_locking,
            host.numa,
        )
        for check in question(context)
    ]
    by_name = {check.name: check for check in answers}
    assert by_name["versions"].figures["cuda_runtime"] == torch.version.cuda
    assert by_name["link of GPU 0"].figures["d2h_bytes_per_s"] > 1e9
    assert by_name["page-locked memory"].figures["locked_bytes"] > 0
    attention = by_name["cuDNN attention"].figures
    assert set(attention["tried"]) == {f"{kind} {dim}" for kind, dim in device._TRIED}
    for case, why in attention["tried"].items():
        kind, dim = case.split()
        if not why:  # what ran, torch also said it would take
            assert int(dim) in attention["accepted"][kind]


def test_quick_is_quick_and_the_document_is_valid():
    done = CliRunner().invoke(main, ["doctor", "--quick", "--json"])
    found = validate(json.loads(done.stdout))
    assert done.exit_code == 0, done.output
    assert found["GPU 0"]["figures"]["name"] == torch.cuda.get_device_name(0)
    assert not any(check["status"] == "unknown" for check in found.values())
    assert found["cuDNN attention"]["figures"].get("tried", {}) == {}


def test_a_session_uses_the_probed_link(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMOPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "spill").mkdir()
    result = probe(CUDA, [(str(tmp_path / "spill"), 16 << 20)])
    assert result.hardware.duplex_bytes_per_s > 0
    assert result.hardware.page_lock_bytes_per_s > 0
    assert KeptRates.find(CUDA, [], "").link.rates["d2h_bytes_per_s"] > 1e9
    assert link_key(CUDA)["uuid"]
    model = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.GELU()) for _ in range(4))).cuda()
    with memopt.optimize(model, budget=memopt.Budget(host="256MiB")) as run:
        for _ in range(3):
            model(torch.randn(2048, 512, device="cuda")).sum().backward()
    notes = run.report().notes
    assert any("link kept by memopt probe" in note for note in notes), notes
