"""The README's commands run and its tables are those of the results."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from benchmarks.tables import ORDER, filled
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = [(kind.strip(), text) for kind, text in re.findall(r"```bash([^\n]*)\n(.*?)```", README, re.DOTALL)]
NOT_HERE = ("make test",)


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


@pytest.mark.parametrize("text", [text for kind, text in BLOCKS if kind == ""])
def test_a_quick_command_of_the_readme_runs(text: str) -> None:
    run(text)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("text", [text for kind, text in BLOCKS if kind == "slow" and text.strip() not in NOT_HERE])
def test_a_slow_command_of_the_readme_runs(text: str, pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("--readme-slow"):
        pytest.skip("takes minutes: `make readme` runs it")
    run(text)


def test_the_readme_is_at_most_150_lines() -> None:
    assert len(README.splitlines()) <= 150


def test_the_readmes_tables_are_made_from_the_results() -> None:
    assert filled(README) == README
    everything = (ROOT / "benchmarks" / "README.md").read_text()
    assert filled(everything, ORDER) == everything
    tasks = (ROOT / "examples" / "README.md").read_text()
    assert filled(tasks) == tasks
