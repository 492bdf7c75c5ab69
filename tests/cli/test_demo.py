from __future__ import annotations

import io
import json
from dataclasses import replace

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

import memopt
from memopt.cli import demo as demo_module
from memopt.cli import main
from memopt.cli.demo_worker import DemoConfig, batches, training_text

pytest.importorskip("transformers", reason="the demo trains a transformers model")
pytest.importorskip("matplotlib", reason="the demo draws a picture")

# The demo's own shapes, made small; activations still outweigh parameters, so that half the peak is reachable.
SMALL = DemoConfig(
    num_steps=3,
    num_layers=10,
    hidden_size=96,
    intermediate_size=256,
    num_heads=4,
    sequence_length=512,
)


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return demo_module.run_both(SMALL, 0.5, tmp_path_factory.mktemp("demo"), quiet())


def test_the_two_runs_agree_to_the_last_bit_inside_the_budget(result):
    assert result["losses_equal"]
    assert result["weights_equal"]
    assert result["within_budget"]
    assert result["memopt"]["accounted_peak_bytes"] <= 0.5 * result["plain"]["accounted_peak_bytes"]
    for name in ("plain", "memopt"):
        assert len(result[name]["losses"]) == SMALL.num_steps
    assert result["plain"]["losses"][-1] < result["plain"]["losses"][0]


def test_memory_over_time_reaches_the_peak(result):
    for name in ("plain", "memopt"):
        samples = result[name]["samples"]
        seconds = [sample[0] for sample in samples]
        assert seconds == sorted(seconds)
        highest = max(sample[1] for sample in samples)
        assert highest <= result[name]["accounted_peak_bytes"]
        assert highest >= 0.9 * result[name]["accounted_peak_bytes"]


def test_figure_and_tables_show_the_run(result, tmp_path):
    demo_module._write(result, tmp_path)
    picture = (tmp_path / "memory.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
    assert (
        json.loads((tmp_path / "demo.json").read_text())["budget_bytes"] == result["budget_bytes"]
    )
    console = Console(file=io.StringIO(), width=120)
    console.print(demo_module.loss_table(result))
    console.print(demo_module.memory_table(result))
    text = console.file.getvalue()
    assert text.count(" yes ") == SMALL.num_steps
    assert f"{result['plain']['losses'][0]:.7f}" in text


def test_one_bit_in_one_loss_is_told(result, monkeypatch, tmp_path):
    import math

    changed = json.loads(json.dumps(result))
    losses = changed["memopt"]["losses"]
    losses[1] = math.nextafter(losses[1], 0)
    console = Console(file=io.StringIO(), width=120)
    console.print(demo_module.loss_table(changed))
    assert console.file.getvalue().count(" NO ") == 1
    assert demo_module._bits(losses) != demo_module._bits(result["memopt"]["losses"])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("losses_equal", "the losses differ"),
        ("weights_equal", "the weights differ"),
        ("within_budget", "is above the budget"),
    ],
)
def test_the_command_fails_when_the_claim_does(result, monkeypatch, tmp_path, key, message):
    monkeypatch.setattr(demo_module, "run_both", lambda *_: {**result, key: False})
    ran = CliRunner().invoke(main, ["demo", "--output", str(tmp_path), "--json"])
    assert ran.exit_code == 1
    assert message in ran.output


def test_json_is_one_document_on_stdout(result, monkeypatch, tmp_path):
    monkeypatch.setattr(demo_module, "run_both", lambda *_: result)
    ran = CliRunner().invoke(main, ["demo", "--output", str(tmp_path), "--json"])
    assert ran.exit_code == 0
    document = json.loads(ran.stdout)
    assert document["losses_equal"] is True
    assert "samples" not in document["plain"]


def test_a_worker_that_fails_shows_its_own_words():
    bad = replace(SMALL, hidden_size=98)  # not divisible by the heads
    with pytest.raises(
        click.ClickException, match=r"the plain run ended with status 1(.|\n)*multiple"
    ):
        demo_module.run_worker(bad, "plain", quiet())


def test_a_budget_that_is_refused_is_one_sentence():
    small = replace(SMALL, device_bytes=1 << 20)
    with pytest.raises(
        click.ClickException, match=r"^the memopt run was refused: the device budget"
    ) as info:
        demo_module.run_worker(small, "memopt", quiet())
    assert "Traceback" not in info.value.message


def test_an_output_that_cannot_be_written_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    ran = CliRunner().invoke(main, ["demo", "--output", str(tmp_path / "file/demo")])
    assert ran.exit_code == 2
    assert "Not a directory; name a directory that can be written" in ran.output


def test_the_peak_is_the_reports_and_holds_the_staging_buffers(tmp_path):
    """Buffers between tensors and SSD are no tensors, but memory that the budget bounds."""
    file = tmp_path / "report.json"
    config = replace(SMALL, device_bytes=60 << 20, ssd=f"{tmp_path}:1GiB", report_file=str(file))
    figures = demo_module.run_worker(config, "memopt", quiet())
    report = memopt.RunReport.load(file)
    assert report.moved.ssd_write_bytes > 0
    assert figures["accounted_peak_bytes"] == report.measured.device_bytes
    tensors = max(sample[1] for sample in figures["samples"])
    assert tensors >= 0.9 * figures["accounted_peak_bytes"]


def test_both_runs_see_the_same_batches_of_the_standard_library():
    first, second = (list(batches(SMALL)) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert first[0].shape == (SMALL.batch_size, SMALL.sequence_length)
    assert b"import" in training_text().numpy().tobytes()


def test_the_demo_is_as_large_as_promised():
    from memopt.cli.demo_worker import build_model

    config = DemoConfig()
    num_parameters = sum(parameter.numel() for parameter in build_model(config).parameters())
    assert 10e6 <= num_parameters <= 20e6
    assert config.num_layers >= 10
    assert config.batch_size * config.sequence_length >= 4096


@pytest.mark.parametrize(("idle", "threads"), [(0.0, 1), (2.0, 1), (3.9, 1), (4.0, 2), (64, 8)])
def test_threads_leave_room_for_others(monkeypatch, idle, threads):
    monkeypatch.setattr("memopt.memory.machine.num_idle_cpus", lambda: idle)
    assert demo_module.sensible_threads() == threads


@pytest.mark.parametrize(("options", "threads"), [([], 3), (["--threads", "2"], 2)])
def test_both_runs_get_the_threads(result, monkeypatch, tmp_path, options, threads):
    seen = []

    def run_both(config, *_):
        seen.append(config)
        return result

    monkeypatch.setattr(demo_module, "run_both", run_both)
    monkeypatch.setattr(demo_module, "sensible_threads", lambda: 3)
    ran = CliRunner().invoke(main, ["demo", "--output", str(tmp_path), "--json", *options])
    assert ran.exit_code == 0, ran.output
    assert seen[0].num_threads == threads


def test_the_worker_uses_the_threads_it_is_told(result):
    assert result["num_threads"] == SMALL.num_threads == 1


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    ran = CliRunner().invoke(main, ["demo", "--output", str(tmp_path), "--json"])
    assert ran.exit_code == 0, ran.output


def test_a_missing_library_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(demo_module, "_NEEDS", ("json", "no_such_library"))
    ran = CliRunner().invoke(main, ["demo"])
    assert ran.exit_code == 2
    assert "pip install no_such_library" in ran.output
