"""The pages' code runs, their commands exist, their links lead somewhere, their figures are the result file's.

Python blocks of one page run in order, in one new process and an empty directory; a comment `<!-- setup ... -->` holds
code that readers need not see. Lines of `sh` blocks that begin with `memopt` run after them in the same directory.
"""

from __future__ import annotations

import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from memopt.types.sizes import format_bytes

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$|^<!-- setup\n(.*?)^-->$", re.MULTILINE | re.DOTALL)
FROM_A_CHECKOUT = {"make", "git", "pip", "cd", ".venv/bin/python"}


def blocks(page: Path) -> list[tuple[str, str]]:
    found = BLOCK.findall(page.read_text())
    return [
        (language or ("python" if hidden else ""), code or hidden)
        for language, code, hidden in found
    ]


def shell_lines(page: Path) -> list[str]:
    lines = [
        line for language, code in blocks(page) if language == "sh" for line in code.splitlines()
    ]
    return [line.partition(" #")[0].strip() for line in lines if line.strip() and line[0] != "#"]


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_code_and_commands_run(page, tmp_path):
    code = "\n".join(code for language, code in blocks(page) if language == "python")
    commands = [line for line in shell_lines(page) if line.startswith("memopt ")]
    if not code and not commands:
        pytest.skip("this page has nothing to run")
    script = tmp_path.parent / f"{tmp_path.name}.py"
    script.write_text(code)
    run(page, [sys.executable, str(script)], tmp_path)
    for command in commands:
        if command.split()[1] != "demo":  # minutes; tests/cli/test_demo.py runs it
            run(page, [sys.executable, "-m", *shlex.split(command)], tmp_path)


def run(page: Path, command: list[str], directory: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=directory, timeout=200)
    assert done.returncode == 0, f"{page_id(page)}: {command}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_exist(page):
    from memopt.cli import main

    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in shell_lines(page):
        word, *rest = shlex.split(line)
        if word == "memopt":
            assert rest[0].startswith("-") or rest[0] in main.commands, line
        elif word == "make":
            assert set(rest) <= set(targets), line
        else:
            assert word in FROM_A_CHECKOUT, f"{page_id(page)}: what is {word!r}?"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is new in Python 3.11")
@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_extras_exist(page):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"(?:memopt|\.)\[([\w,]+)\]", page.read_text()):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page_id(page)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_tests_and_modules_that_pages_name_exist(page):
    for name in re.findall(
        r"`((?:tests|memopt|examples|benchmarks|docs)/[\w./]+)`", page.read_text()
    ):
        assert (ROOT / name).exists(), f"{page_id(page)} names {name}"


def test_the_index_lists_every_page():
    index = (ROOT / "docs/README.md").read_text()
    missing = [page.name for page in PAGES if page.parent.name == "docs" and page.name not in index]
    assert missing == ["README.md"]


def test_the_readme_shows_the_figures_of_the_demos_own_result():
    """`docs/images/demo.json` is what `memopt demo --json` printed; the picture is of the same run."""
    result = json.loads((ROOT / "docs/images/demo.json").read_text())
    assert (ROOT / "docs/images/demo.png").read_bytes().startswith(b"\x89PNG")
    assert result["losses_equal"]
    assert result["weights_equal"]
    assert result["within_budget"]
    plain, ours = result["plain"], result["memopt"]
    rows = [
        (label, format_bytes(plain[key]), format_bytes(ours[key]), ours[key] / plain[key])
        for label, key in (
            ("accounted peak", "accounted_peak_bytes"),
            ("resident peak", "resident_peak_bytes"),
        )
    ]
    plain_s, ours_s = (statistics.median(run["cpu_s"][1:]) for run in (plain, ours))
    rows.append(("CPU time of a step", f"{plain_s:.2f} s", f"{ours_s:.2f} s", ours_s / plain_s))
    text = (ROOT / "README.md").read_text()
    for label, of_plain, of_ours, share in rows:
        assert f"| {label} | {of_plain} | {of_ours} | {share:.2f} |" in text, label
