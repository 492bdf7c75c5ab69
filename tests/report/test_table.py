from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from memopt.report import RunReport, render_text
from memopt.report.table import MAX_PLACEMENT_ROWS, format_days, format_seconds
from memopt.types.budget import ResolvedBudget, SsdDirectory
from memopt.types.errors import ConfigError
from memopt.types.report import Footprint, Moved, PlacementRow, SsdWear

MIB = 1 << 20


def make_report(**changes) -> RunReport:
    fields = {
        "device": "cpu",
        "budget": ResolvedBudget(
            device_bytes=600 * MIB,
            host_bytes=0,
            ssd=(SsdDirectory(path="/ssd", size_bytes=800 * MIB, is_tmpfs=False),),
        ),
        "predicted": Footprint(
            device_bytes=550 * MIB, host_bytes=0, ssd_bytes=300 * MIB, step_s=1.1
        ),
        "measured": Footprint(
            device_bytes=500 * MIB, host_bytes=0, ssd_bytes=301 * MIB, step_s=1.0
        ),
        "baseline": Footprint(device_bytes=1486 * MIB, step_s=0.9),
        "num_steps": 5,
        "first_step_s": 2.5,
        "exposed_s": 0.012,
        "moved": Moved(ssd_write_bytes=1500 * MIB, ssd_read_bytes=1400 * MIB),
        "placements": (
            PlacementRow(
                kind="aten.mm.default", placement="ssd", num_outputs=40, size_bytes=300 * MIB
            ),
            PlacementRow(
                kind="aten.silu.default", placement="recompute", num_outputs=10, size_bytes=MIB
            ),
        ),
        "resident_bytes": 900 * MIB,
        "notes": ("attention is stored",),
        "versions": {"torch": "2.13.0"},
    }
    return RunReport(**{**fields, **changes})


def row(text: str, label: str) -> list[str]:
    """The cells of the first line that begins with `label`."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"[│|]", line)[1:-1]]
        if cells and cells[0] == label:
            return cells[1:]
    raise AssertionError(f"no row {label!r} in\n{text}")


def test_predicted_stands_beside_measured():
    text = str(make_report())
    assert text == render_text(make_report())
    assert row(text, "device peak") == ["1.45 GiB", "600 MiB", "550 MiB", "500 MiB", "+10.0 %"]
    assert row(text, "SSD peak") == ["-", "800 MiB", "300 MiB", "301 MiB", "-0.3 %"]
    assert row(text, "host peak") == ["-", "-", "0 B", "0 B", ""]
    assert row(text, "median step") == ["900 ms", "", "1.1 s", "1 s", "+10.0 %"]
    assert row(text, "first step")[3] == "2.5 s"
    assert row(text, "exposed time per step")[3] == "12 ms"
    assert row(text, "resident set, peak")[3] == "900 MiB"
    assert row(text, "written to SSD")[3] == "1.46 GiB"
    assert row(text, "40 x aten.mm.default")[2:4] == ["ssd", "300 MiB"]
    assert "5 steps on cpu" in text
    assert "note: attention is stored" in text


@pytest.mark.parametrize(
    ("num_planned", "label", "off"),
    [
        (None, "median step", "+10.0 %"),
        (4, "median of 4 planned steps", "+10.0 %"),
        (1, "median of 1 planned step", "+10.0 %"),
        (0, "median, before the plan", ""),
    ],
)
def test_the_median_says_which_steps_it_is_of(num_planned, label, off):
    text = str(make_report(num_planned_steps=num_planned))
    assert row(text, label) == ["900 ms", "", "1.1 s", "1 s", off]


def test_what_is_not_known_is_a_dash_and_what_does_not_exist_is_left_out():
    text = str(make_report(baseline=Footprint(), measured=Footprint(), moved=Moved(), num_steps=0))
    assert row(text, "device peak") == ["-", "600 MiB", "550 MiB", "-", ""]
    assert row(text, "moved")[3] == "nothing"
    assert "CUDA context" not in text
    with_cuda = str(make_report(device_context_bytes=500 * MIB, device_reserved_bytes=599 * MIB))
    assert row(with_cuda, "CUDA context")[3] == "500 MiB"
    assert row(with_cuda, "reserved by PyTorch, peak")[3] == "599 MiB"


def test_a_long_tail_of_placements_is_summed_per_placement():
    rows = tuple(
        PlacementRow(
            kind=f"op{i}", placement=("device", "ssd")[i % 2], num_outputs=1, size_bytes=1000 - i
        )
        for i in range(MAX_PLACEMENT_ROWS + 5)
    )
    text = str(make_report(placements=rows))
    others = [line for line in text.splitlines() if "x other" in line]
    assert len(others) == 2
    shown = sum(int(n) for n in re.findall(r"(\d+) x (?:op\d+|other)", text))
    assert shown == len(rows)


def test_text_in_brackets_is_not_markup():
    assert "[bold]kept[/bold]" in str(make_report(notes=("[bold]kept[/bold]",)))


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "-"), (0.0, "0 ms"), (0.0123, "12.3 ms"), (1.734, "1.73 s"), (321.4, "321 s")],
)
def test_seconds(seconds, shown):
    assert format_seconds(seconds) == shown


def test_saved_and_loaded(tmp_path):
    report = make_report()
    report.save(tmp_path / "report.json")
    assert RunReport.load(tmp_path / "report.json") == report
    data = json.loads((tmp_path / "report.json").read_text())
    for key in ("predicted", "measured"):
        assert set(data[key]) == {"device_bytes", "host_bytes", "ssd_bytes", "step_s"}
    assert report.median_step_s == data["measured"]["step_s"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "is not a memopt report"),
        ("[]", "it holds a list"),
        ("{}", "format is None"),
        ('{"format": "memopt-run-report-1"}', "not a memopt report: 'budget'"),
        ('{"format": "memopt-plan-1"}', "format is 'memopt-plan-1'"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "file").write_text(text)
    with pytest.raises(ConfigError, match=message):
        RunReport.load(tmp_path / "file")


def test_unknown_fields_are_refused(tmp_path):
    data = {**make_report().to_dict(), "colour": "red"}
    with pytest.raises(ConfigError, match="colour"):
        RunReport.from_dict(data)


def test_without_the_report_package_it_prints_json(tmp_path):
    make_report().save(tmp_path / "report.json")
    code = (
        "import sys; from memopt.types.report import RunReport\n"
        f"print(RunReport.load({str(tmp_path / 'report.json')!r})); assert 'rich' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout)["num_steps"] == 5


def test_wear_is_a_closed_form():
    wear = SsdWear.at_rate(300 * 10**6, 1.5, 600 * 10**12)
    assert wear.day_bytes == 300 * 10**6 * 57_600  # 86,400 s / 1.5 s
    assert wear.lifetime_days == pytest.approx(600e12 / (300e6 * 57_600))
    assert SsdWear.at_rate(7, 2.0, None) == SsdWear(step_bytes=7, day_bytes=7 * 43_200)
    assert SsdWear.at_rate(7, None, 10) == SsdWear(step_bytes=7, endurance_bytes=10)
    nothing = SsdWear.at_rate(0, 1.0, 10)
    assert (nothing.day_bytes, nothing.lifetime_days) == (0, None)


def test_wear_is_one_line_and_saved(tmp_path):
    report = make_report(wear=SsdWear.at_rate(300 << 20, 1.0, 600 * 10**12))
    label = "SSD: 300 MiB a step"
    assert row(str(report), label) == ["", "546 TiB rated", "", "24.7 TiB a day", "lasts 22.1 days"]
    unrated = make_report(wear=SsdWear.at_rate(300 << 20, 1.0, None))
    assert row(str(unrated), label) == ["", "", "", "24.7 TiB a day", ""]
    for wear in (None, SsdWear.at_rate(0, 1.0, 10)):
        assert "a step" not in str(make_report(wear=wear))
    report.save(tmp_path / "report.json")
    assert RunReport.load(tmp_path / "report.json") == report
    keys = {"step_bytes", "day_bytes", "endurance_bytes", "lifetime_days"}
    assert set(report.to_dict()["wear"]) == keys


def test_reports_saved_before_wear_was_known_load():
    data = make_report().to_dict()
    del data["wear"], data["budget"]["ssd_endurance_bytes"]
    assert RunReport.from_dict(data) == make_report()


@pytest.mark.parametrize(
    ("days", "shown"),
    [(0.5, "0.5 days"), (22.14, "22.1 days"), (412.4, "412 days"), (3652.5, "10.0 years")],
)
def test_days(days, shown):
    assert format_days(days) == shown
