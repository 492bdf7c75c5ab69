"""`memopt doctor` as people and programs run it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import get_args

import pytest
from click.testing import CliRunner

from memopt.cli import checks, main
from memopt.cli.checks import Check, Context, run_checks
from memopt.cli.checks.base import Status
from memopt.cli.doctor import FORMAT, to_document

STATUSES = set(get_args(Status))


def validate(document: dict) -> dict[str, dict]:
    """Check the document's form; return its checks by name."""
    assert set(document) == {"format", "ok", "quick", "counts", "checks"}
    assert document["format"] == FORMAT
    assert set(document["counts"]) == STATUSES
    named = {check["name"]: check for check in document["checks"]}
    assert len(named) == len(document["checks"]) == sum(document["counts"].values())
    for check in document["checks"]:
        assert set(check) == {"name", "status", "found", "todo", "figures"}
        assert check["status"] in STATUSES
        assert check["found"]
        assert "\n" not in check["found"]
        assert isinstance(check["figures"], dict)
        assert bool(check["todo"]) == (check["status"] in ("weak", "broken"))
    assert document["ok"] == (document["counts"]["broken"] == 0)
    return named


def invoke(*arguments: str):
    return CliRunner().invoke(main, ["doctor", *arguments])


def test_the_whole_doctor_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMOPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "spill").mkdir()
    request = f"{tmp_path / 'spill'}:8MiB"
    done = subprocess.run(
        [sys.executable, "-m", "memopt", "doctor", "--json", "--ssd", request],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    found = validate(json.loads(done.stdout))
    assert found["versions"]["status"] == "ok"
    assert found["versions"]["figures"]["python"].startswith("3.")
    ssd = found[f"SSD {request}"]["figures"]
    assert ssd["write_bytes_per_s"] > 0
    assert 0 < ssd["probed_bytes"] <= 8 << 20
    assert found["host memory"]["figures"]["free_bytes"] > 0
    assert not any(check["status"] == "unknown" for check in found.values())
    assert list((tmp_path / "spill").iterdir()) == []
    assert not (tmp_path / "cache").exists(), "only memopt probe keeps figures"


def test_quick_measures_nothing(tmp_path, monkeypatch):
    import memopt.memory.rates as rates

    def refuse(*arguments, **more):
        raise AssertionError("measured")

    for name in ("measure_disk", "link_rates", "memcpy_rate"):
        monkeypatch.setattr(rates, name, refuse)
    done = invoke("--quick", "--json", "--ssd", str(tmp_path))
    found = validate(json.loads(done.stdout))
    assert done.exit_code == 0
    assert not any(check["status"] == "unknown" for check in found.values())
    assert "write_bytes_per_s" not in found[f"SSD {tmp_path}"]["figures"]


def test_people_get_a_table_and_what_to_do(tmp_path):
    done = invoke("--quick", "--ssd", str(tmp_path / "missing"))
    assert done.exit_code == 1
    for name in ("versions", "host memory", "I/O engine", "BROKEN", "What to do:"):
        assert name in done.output
    todo = done.output.partition("What to do:")[2]
    assert f"SSD {tmp_path / 'missing'}: write --ssd DIR" in todo


BY_STATUS = {
    status: Check(name=status, status=status, found="x", todo="y" if status == "broken" else "")
    for status in STATUSES
}


@pytest.mark.parametrize("status", sorted(STATUSES))
def test_only_what_is_broken_fails(monkeypatch, status):
    monkeypatch.setattr(checks, "run_checks", lambda context: [BY_STATUS["ok"], BY_STATUS[status]])
    assert invoke().exit_code == int(status == "broken")
    done = invoke("--json")
    assert done.exit_code == int(status == "broken")
    assert json.loads(done.stdout)["ok"] == (status != "broken")


def test_a_path_stays_what_it_is(monkeypatch):
    """Rich takes [b] for a style and :abc: for a picture."""
    odd = Check(name="SSD /d:abc", status="weak", found="[b]:abc:", todo="[b] or :abc:")
    monkeypatch.setattr(checks, "run_checks", lambda context: [odd])
    output = invoke().output
    assert "[b]:abc:" in output
    assert "  SSD /d:abc: [b] or :abc:" in output


def test_nothing_to_do_is_said(monkeypatch):
    monkeypatch.setattr(checks, "run_checks", lambda context: [BY_STATUS["ok"]])
    assert "Nothing to do." in invoke().output


def test_a_check_that_fails_says_so_and_stops_no_other():
    def faint(context):
        raise FileNotFoundError(2, "No such file or directory", "/sys/none")

    def silent(context):
        raise ZeroDivisionError

    def fine(context):
        return [Check(name="fine", status="ok", found="x")]

    found = run_checks(Context(), (("a", faint), ("b", silent), ("c", fine)))
    assert [check.name for check in found] == ["a", "b", "fine"]
    assert [check.status for check in found] == ["unknown", "unknown", "ok"]
    assert "FileNotFoundError" in found[0].found
    assert "/sys/none" in found[0].found
    assert "no message" in found[1].found
    validate(to_document(found, quick=True))


def test_every_check_survives_a_machine_without_proc_and_sys(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMOPT_CACHE", str(tmp_path / "cache"))
    context = Context(root=tmp_path / "nothing", quick=True, ssd=[str(tmp_path)])
    found = run_checks(context)
    assert len(found) == len(checks.QUESTIONS)
    validate(to_document(found, quick=True))
    assert not [check for check in found if check.status in ("unknown", "broken")]


def test_every_check_survives_a_torch_that_does_not_load(tmp_path):
    """In a new interpreter, whose torch raises what a broken installation raises."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise OSError('libcudart.so.13: cannot open')")
    code = "from memopt.cli import main; main(['doctor', '--quick', '--json'])"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True,
        text=True,
    )
    found = validate(json.loads(done.stdout))
    assert done.returncode == 1
    assert found["versions"]["status"] == "broken"
    assert "libcudart.so.13: cannot open" in found["versions"]["found"]
    assert found["I/O engine"]["status"] == "ok"
    assert found["host memory"]["status"] in ("ok", "weak")
