from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

import memopt
from memopt.cli import main
from memopt.types.report import RunReport
from tests.report.test_table import make_report


@pytest.fixture
def saved(tmp_path):
    make_report().save(tmp_path / "report.json")
    return str(tmp_path / "report.json")


def test_shows_the_table(saved):
    result = CliRunner().invoke(main, ["report", saved])
    assert result.exit_code == 0
    assert result.output.strip() == str(make_report()).strip()


def test_json_is_the_report_and_nothing_else(saved):
    result = CliRunner().invoke(main, ["report", saved, "--json"])
    assert RunReport.from_dict(json.loads(result.stdout)) == make_report()


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "does not exist"), ("{}", "file.json is not a memopt report: format is None")],
)
def test_a_wrong_file_is_a_usage_error(tmp_path, text, message):
    file = tmp_path / "file.json"
    if text is not None:
        file.write_text(text)
    result = CliRunner().invoke(main, ["report", str(file)])
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_every_command_has_json():
    for name, command in main.commands.items():
        options = [option for parameter in command.params for option in parameter.opts]
        assert "--json" in options, f"memopt {name} has no --json"


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "memopt", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"memopt, version {memopt.__version__}"


def test_help_is_quick_because_torch_is_not_imported():
    code = (
        "import sys; from memopt.cli import main\n"
        "main(['--help'], standalone_mode=False); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "demo" in done.stdout
