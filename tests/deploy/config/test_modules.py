"""Test that modules are found beside the run file and may not hide a package of Antiphon."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import user_code
from cluster.errors import InputError
from deploy.config.load import load_run_config

RUN = """
[model]
builder = "{module}:build"
[data]
builder = "{module}:data"
[reward_service]
scorer = "{module}:score"
[run]
stages = ["ppo"]
"""
FUNCTIONS = "def build(directory, *, seed): ...\ndata = score = build\n"


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "tasks" / "own"
    folder.mkdir(parents=True)
    (folder / "run.toml").write_text(RUN.format(module="own_task"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(user_code, "_FOLDERS", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield folder
    sys.modules.pop("own_task", None)


def test_a_module_beside_the_run_file_is_found(task: Path) -> None:
    (task / "own_task.py").write_text(FUNCTIONS)
    config = load_run_config(task / "run.toml")
    assert config.run.module_folders == (Path("tasks/own"),)
    assert user_code.locate("own_task:score", "key") == "tasks/own/own_task.py:2"
    assert user_code.load("own_task:build", "key").__name__ == "build"


def test_a_module_in_the_working_directory_comes_first(task: Path) -> None:
    (task / "own_task.py").write_text(FUNCTIONS)
    Path("own_task.py").write_text(FUNCTIONS)
    assert load_run_config(task / "run.toml").run.module_folders == ()


def test_a_missing_module_is_refused_with_the_folders_searched(task: Path) -> None:
    load_run_config(task / "run.toml", ['run.module_folders = ["."]'])
    with pytest.raises(InputError) as refusal:
        user_code.locate("own_task:score", "reward_service.scorer")
    assert str(task) in refusal.value.what


@pytest.mark.parametrize("name", ["deploy.py", "learner/scorers.py"])
def test_a_module_named_like_a_package_of_antiphon_is_refused(task: Path, name: str) -> None:
    (task / name).parent.mkdir(exist_ok=True)
    (task / name).write_text(FUNCTIONS)
    with pytest.raises(InputError, match="give this module another name") as refusal:
        load_run_config(task / "run.toml")
    assert str(task) in refusal.value.where
