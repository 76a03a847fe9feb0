"""The tutorial in examples/README.md: its files are written as shown, and its commands run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PAGE = (ROOT / "examples" / "README.md").read_text().partition("## Your own task")[2].partition("\n## ")[0]


def write_task(folder: Path) -> None:
    """Write every file that the page shows, under the name just before it."""
    (folder / "guess").mkdir()
    (folder / "guess" / "__init__.py").touch()
    for before, _, text in re.findall(r"(.*?)```(python|toml)\n(.*?)```", PAGE, re.DOTALL):
        (folder / re.findall(r"`(guess/[a-z.]+)`", before)[-1]).write_text(text)


def antiphon(folder: Path, *arguments: str, answers: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "deploy.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, input=answers, capture_output=True, text=True)


@pytest.mark.process
def test_the_page_shows_three_files_and_the_task_they_make_is_whole(tmp_path: Path) -> None:
    write_task(tmp_path)
    assert sorted(path.name for path in (tmp_path / "guess").iterdir()) == [
        "__init__.py",
        "game.py",
        "model.py",
        "run.toml",
    ]
    done = antiphon(tmp_path, "check", "guess/run.toml")
    assert done.returncode == 0, done.stderr
    assert "guess/game.py:4" in done.stdout


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_it_trains_from_the_page_alone(tmp_path: Path) -> None:
    write_task(tmp_path)
    done = antiphon(tmp_path, "train", "guess/run.toml", "--set", "learner.num_steps = 8")
    assert done.returncode == 0, done.stderr
    assert "found" in done.stdout
