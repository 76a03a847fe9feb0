"""The README's commands run, its pictures exist, and the tables of all pages are those of the results."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from benchmarks.tables import ORDER, filled
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = [(kind.strip(), text) for kind, text in re.findall(r"```bash([^\n]*)\n(.*?)```", README, re.DOTALL)]
PICTURES = re.findall(r"(?:src|srcset)=\"([^\"]+)\"|!\[[^]]*\]\(([^)]+)\)", README)
WHOLE_SUITE = "make test\n"
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "AGENTS.md")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def run(text: str) -> None:
    path = f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=ROOT,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.process
@pytest.mark.parametrize("text", [text for kind, text in BLOCKS if kind == ""])
def test_a_quick_command_of_the_readme_runs(text: str) -> None:
    run(text)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("text", [text.replace(WHOLE_SUITE, "") for kind, text in BLOCKS if kind == "slow"])
def test_a_slow_command_of_the_readme_runs(text: str, pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("--readme-slow"):
        pytest.skip("takes minutes: `make readme` runs it")
    run(text)


def test_the_readme_is_at_most_150_lines() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("name", [link or picture for link, picture in PICTURES])
def test_a_picture_of_the_readme_exists(name: str) -> None:
    assert (ROOT / name).is_file()


@pytest.mark.parametrize("page", PAGES)
def test_a_link_to_a_file_has_a_target(page: str) -> None:
    assert [link for link in LINK.findall((ROOT / page).read_text()) if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("name", ["docs/benchmarks.md", "examples/README.md"])
def test_the_tables_of_a_page_are_made_from_the_results(name: str) -> None:
    page = (ROOT / name).read_text()
    assert filled(page) == page


def test_the_table_of_all_figures_is_made_from_the_results() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert filled(page, ORDER) == page
