"""`antiphon new`: every example task becomes a task of the user's own that `antiphon check` accepts."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from deploy.cli import app
from deploy.commands.setup.templates import task_names
from tests.support.paths import ROOT

IMPORT = """
import importlib, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
assert "examples" not in sys.modules
"""
Antiphon = Callable[..., tuple[int, str, str]]


@pytest.fixture
def antiphon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Antiphon:
    """Runs a command in an empty working directory; returns exit code, stdout and the last line of stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app(list(arguments))
        out, err = capsys.readouterr()
        return int(str(ended.value.code)), out, (err.splitlines() or [""])[-1]

    return run


def test_the_example_tasks_are_found() -> None:
    folders = {path.parent.name for path in (ROOT / "examples").glob("*/run.toml")}
    assert set(task_names()) == folders
    assert {"letters", "reviews", "many"} <= folders


EXTRAS = {"reasoning_gym": "reasoning_gym", "text_arena": "textarena"}
"""Tasks that need an extra package, and its module."""


@pytest.mark.parametrize("task", task_names())
def test_new_creates_a_task_that_check_accepts(antiphon: Antiphon, tmp_path: Path, task: str) -> None:
    code, out, last = antiphon("new", "my_task", "--from", task)
    assert code == 0, last
    assert out.splitlines()[-2:] == ["  antiphon check my_task/run.toml", "  antiphon train my_task/run.toml"]
    files = [path for path in (tmp_path / "my_task").rglob("*") if path.is_file()]
    assert not [path for path in files if "examples." in path.read_text() or "examples/" in path.read_text()]
    assert tomllib.loads((tmp_path / "my_task" / "run.toml").read_text())["run"]["name"] == "my_task"
    for run_file in sorted((tmp_path / "my_task").glob("*.toml")):
        code, out, last = antiphon("check", str(run_file.relative_to(tmp_path)))
        if task == "gsm8k":  # model and data are on the Hub, and tests have no network
            assert (code, "`hf download Qwen/Qwen2.5-0.5B-Instruct`" in last) == (2, True), last
        else:
            assert (code, out.splitlines()[-1:]) == (0, ["ok"]), last


@pytest.mark.process
def test_the_modules_of_new_tasks_can_be_imported(antiphon: Antiphon, tmp_path: Path) -> None:
    for task in task_names():
        if find_spec(EXTRAS.get(task, "pytest")):
            assert antiphon("new", f"my_{task}", "--from", task)[0] == 0
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.py")]
    modules = [".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, *modules], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_new_prints_where_to_run_the_commands_if_the_folder_is_elsewhere(
    antiphon: Antiphon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, out, _ = antiphon("new", "../mine", "--from", "letters")
    assert (code, out.splitlines()[-3:-1]) == (0, [f"  cd {tmp_path}", "  antiphon check mine/run.toml"])
    code, out, _ = antiphon("new", "nested/mine", "--from", "letters")
    assert (code, out.splitlines()[-2]) == (0, "  antiphon check nested/mine/run.toml")
    assert 'scorer = "nested.mine.scorers:count_a"' in (tmp_path / "elsewhere/nested/mine/run.toml").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["taken", "--from", "letters"], "error: taken: already exists; choose another folder"),
        (["mine", "--from", "chess"], "error: --from: no example task 'chess'; choose one of dialogue, game, "),
        (["my-task", "--from", "letters"], "error: my-task: 'my-task' cannot be a Python module; use letters, digits"),
        (["class", "--from", "letters"], "error: class: 'class' cannot be a Python module; use letters, digits"),
        (["json", "--from", "letters"], "error: json: 'json' is the name of an installed Python module"),
        (["learner", "--from", "letters"], "error: learner: 'learner' is the name of an installed Python module"),
        (["mine"], "error: antiphon: Missing option '--from'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_new_writes_nothing_if_the_arguments_are_wrong(
    antiphon: Antiphon, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "taken").mkdir()
    code, out, last = antiphon("new", *arguments)
    assert (code, out) == (2, "")
    assert last.startswith(message), last
    assert list(tmp_path.rglob("*")) == [tmp_path / "taken"]


@pytest.mark.slow
@pytest.mark.ray
def test_a_new_task_can_be_trained(antiphon: Antiphon, tmp_path: Path) -> None:
    assert antiphon("new", "my_task", "--from", "letters")[0] == 0
    command = [sys.executable, "-m", "deploy.cli", "train", "my_task/run.toml", "--set", "learner.num_steps = 1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "my_task" / "policy" / "model.safetensors").exists()
