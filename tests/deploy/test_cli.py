"""The command line: exit codes, the last line on stderr, and the status of a run after every kind of end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import LearnerError
from deploy.cli import app
from deploy.config.schema import RunConfig
from deploy.run.directory import RunDirectory
from reward_service.http.tokens import TokenBook
from tests.support.paths import ROOT

TINY = """
[run]
stages = ["ppo"]
[model]
builder = "task:build"
[data]
builder = "task:build"
[reward_service]
scorer = "task:score"
[learner]
num_steps = 3
"""
Launch = Callable[[RunConfig, RunDirectory, list[str], Any], None]


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ANTIPHON_TOKEN", raising=False)
    (tmp_path / "run.toml").write_text(TINY)
    (tmp_path / "task.py").write_text("def build(directory, *, seed): ...\ndef score(prompts, responses): ...\n")
    return tmp_path


def shell(*arguments: str) -> tuple[int, str, str]:
    """Return exit code, stdout and the last line of stderr of a command in a separate process."""
    command = [sys.executable, "-m", "deploy.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    return done.returncode, done.stdout, (done.stderr.splitlines() or [""])[-1]


@pytest.fixture
def antiphon(
    task: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`antiphon(*arguments, launch=)` does the same in this process, with `launch` in place of the stages.

    `scale` sets RAY_AUTH_MODE for its process; the fixture restores it, or the Ray of later tests could not start.
    """
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_MODE")

    def run(*arguments: str, launch: Launch | None = None) -> tuple[int, str, str]:
        fake = types.ModuleType("deploy.stages.launch")
        fake.run = launch  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "deploy.stages.launch", fake)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app(list(arguments))
        out, err = capsys.readouterr()
        return int(str(ended.value.code)), out, (err.splitlines() or [""])[-1]

    return run


def status(task: Path) -> dict[str, Any]:
    name = task.name
    stored: dict[str, Any] = json.loads((task / "runs" / name / "status.json").read_text())
    return stored


def train_to_the_end(config: RunConfig, run: RunDirectory, stages: list[str], view: Any) -> None:
    run.update_status(stage="ppo", step=config.learner.num_steps, ray_address="127.0.0.1:1")
    (run.path / "checkpoints" / "ppo" / f"step-{config.learner.num_steps:06d}").mkdir(parents=True)
    (run.path / "policy").mkdir()
    (run.path / "policy" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')


def test_train_does_nothing_if_the_run_is_done(antiphon: Callable[..., tuple[int, str, str]], task: Path) -> None:
    code, _, last = antiphon("train", "run.toml", launch=train_to_the_end)
    assert (code, last) == (0, f"done: runs/{task.name}")
    assert status(task) == {"state": "DONE", "stage": "ppo", "step": 3, "ray_address": None, "error": None}
    for target in ("run.toml", f"runs/{task.name}"):
        code, _, last = antiphon("train", target)
        assert (code, last) == (0, f"ppo: already done in runs/{task.name} (--fresh starts over)")


def test_train_names_changed_settings_and_fails_unless_fresh(
    antiphon: Callable[..., tuple[int, str, str]], task: Path
) -> None:
    antiphon("train", "run.toml", launch=train_to_the_end)
    code, _, last = antiphon("train", "run.toml", "--set", "learner.num_steps = 2")
    assert code == 2
    assert "settings have changed: learner.num_steps (was 3, now 2)" in last
    code, _, _ = antiphon("train", "run.toml", "--set", "learner.num_steps = 2", "--fresh", launch=train_to_the_end)
    assert (code, status(task)["step"]) == (0, 2)


@pytest.mark.parametrize("target", ["run.toml", "RUN"])
def test_a_finished_run_continues_with_more_steps(
    antiphon: Callable[..., tuple[int, str, str]], task: Path, target: str
) -> None:
    target = target.replace("RUN", f"runs/{task.name}")
    antiphon("train", "run.toml", launch=train_to_the_end)
    (task / "runs" / task.name / "policy").rename(task / "before")
    more = ("--set", "learner.num_steps = 5")
    code, _, _ = antiphon("train", target, *more, launch=train_to_the_end)
    assert (code, status(task)["step"]) == (0, 5)
    assert "already done" in antiphon("train", target, *more)[2]


def test_a_reward_model_is_retrained_with_changed_settings_of_its_own(
    antiphon: Callable[..., tuple[int, str, str]], task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def retrain(config: RunConfig, path: Path, view: Any) -> list[int]:
        trained.append((config.reward_model.label_smoothing, path))
        return [8000]

    monkeypatch.setattr("deploy.stages.reward_model.retrain", retrain)
    antiphon("train", "run.toml", launch=train_to_the_end)
    run = task / "runs" / task.name
    smoothed = ("--set", "reward_model.label_smoothing = 0.1")
    assert antiphon("reward-model", str(run), *smoothed)[0] == 0
    assert trained == [(0.1, run)]
    code, _, last = antiphon("reward-model", str(run), "--fresh")
    assert (code, last.startswith("error: --fresh: would delete the run")) == (2, True)
    assert len(trained) == 1


def test_a_failed_part_is_reported_and_its_traceback_is_kept(
    antiphon: Callable[..., tuple[int, str, str]], task: Path
) -> None:
    def fail(*_: Any) -> None:
        raise LearnerError("learner 0", "ran out\nof memory")

    assert antiphon("train", "run.toml", launch=fail)[::2] == (1, "error: learner 0: ran out of memory")
    assert (status(task)["state"], status(task)["error"]) == ("FAILED", "learner 0: ran out\nof memory")
    assert "LearnerError" in (task / "runs" / task.name / "logs" / "errors.log").read_text()


def test_an_unexpected_error_is_one_line_with_a_traceback_in_the_logs(
    antiphon: Callable[..., tuple[int, str, str]], task: Path
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("division by zero")

    code, _, last = antiphon("train", "run.toml", launch=fail)
    assert code == 1
    assert last.startswith("error: antiphon: ZeroDivisionError: division by zero (see ")
    assert status(task)["state"] == "FAILED"
    assert "ZeroDivisionError" in (task / "runs" / task.name / "logs" / "errors.log").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_prints_how_to_resume(
    antiphon: Callable[..., tuple[int, str, str]], task: Path, number: signal.Signals
) -> None:
    def interrupted(*_: Any) -> None:
        signal.raise_signal(number)

    code, _, last = antiphon("train", "run.toml", launch=interrupted)
    assert (code, last) == (130, f"interrupted; the same command resumes {task}/runs/{task.name}")
    assert status(task)["state"] == "INTERRUPTED"
    assert antiphon("train", "run.toml", launch=train_to_the_end)[0] == 0


@pytest.mark.process
def test_a_dry_run_prints_the_resolved_run_file_and_writes_nothing(task: Path) -> None:
    code, out, _ = shell("train", "run.toml", "--dry-run", "--set", "learner.num_steps = 7", "--name", "other")
    resolved = tomllib.loads(out)
    assert code == 0
    assert (resolved["run"]["name"], resolved["learner"]["num_steps"], resolved["learner"]["clip"]) == ("other", 7, 0.2)
    assert not (task / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        (["train", "none.toml"], "error: none.toml: cannot read the run file (No such file or directory)"),
        (["train", "run.toml", "--set", "sft.num_step = 1"], "sft.num_step: unknown key (did you mean num_steps?)"),
        (["train", "run.toml", "--set", 'data.sft = "x.jsonl"'], "error: x.jsonl: no such data set"),
        (["check", "run.toml", "--set", 'reward_service.scorer = "task:f"'], "task has no function 'f'"),
        (["evaluate", "run.toml"], "error: ppo: not done (run antiphon ppo)"),
        (["scale", "runs", "--rollout-actors", "2"], "error: runs: no such run directory"),
        (["chat", "."], "error: .: not a run directory (it has no config.toml)"),
        (["label", "."], "error: .: not a run directory (it has no config.toml)"),
        (["serve-rewards", "run.toml", "--host", "0.0.0.0"], "set ANTIPHON_TOKEN, or antiphon token RUN --add NAME"),
        (
            ["serve-rewards", "run.toml", "--set", 'reward_service.scorer = "reward_model"'],
            "error: reward_model: not trained (run antiphon reward-model)",
        ),
        (["submit", "run.toml", "--address", "http://127.0.0.1:9"], "no Ray answers at this address"),
        (["submit", "run.toml", "--address", "http://example.invalid:1"], "error: --runs-dir: runs is relative"),
        (["evaluate-rewards", "x.jsonl"], "give one of --run, --reward-model and --url"),
        (["evaluate-rewards", "x.jsonl", "--run", "runs"], "error: runs: no such run directory"),
        (["trian", "run.toml"], "error: antiphon: No such command 'trian'. Did you mean 'train'?"),
        (["train"], "error: antiphon: Missing argument 'TARGET'"),
        (["scale", "runs"], "error: antiphon: Missing option '--rollout-actors'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_exits_with_2_and_one_line_and_writes_nothing(
    antiphon: Callable[..., tuple[int, str, str]], task: Path, arguments: list[str], last: str
) -> None:
    before = sorted(task.rglob("*"))
    code, out, found = antiphon(*arguments)
    assert (code, out) == (2, "")
    assert found.startswith("error: ")
    assert last in found
    assert sorted(task.rglob("*")) == before


@pytest.mark.process
def test_the_command_as_a_process_exits_the_same_way(task: Path) -> None:
    code, out, last = shell("train", "none.toml")
    assert (code, out, last.partition(" (")[0]) == (2, "", "error: none.toml: cannot read the run file")


def test_scale_fails_if_the_run_is_over(antiphon: Callable[..., tuple[int, str, str]], task: Path) -> None:
    antiphon("train", "run.toml", launch=train_to_the_end)
    code, _, last = antiphon("scale", f"runs/{task.name}", "--rollout-actors", "2")
    assert (code, last) == (2, f"error: runs/{task.name}: is not running (DONE)")


def test_export_copies_the_policy_and_overwrites_nothing(
    antiphon: Callable[..., tuple[int, str, str]], task: Path
) -> None:
    antiphon("train", "run.toml", launch=train_to_the_end)
    assert antiphon("export", f"runs/{task.name}", "--output", "model")[:2] == (
        0,
        "model: LlamaForCausalLM, 0.0 MiB (PPO step 3)\n",
    )
    assert (task / "model" / "config.json").exists()
    assert antiphon("export", f"runs/{task.name}", "--output", "model")[::2] == (
        2,
        "error: model: already exists; choose another --output",
    )


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_command_has_a_help_page(antiphon: Callable[..., tuple[int, str, str]], option: str) -> None:
    code, out, _ = antiphon(option)
    assert code == 0
    stages = ["sft", "preferences", "dpo", "reward-model", "ppo", "evaluate"]
    others = [
        "check",
        "submit",
        "scale",
        "serve-rewards",
        "evaluate-rewards",
        "chat",
        "label",
        "export",
        "new",
        "token",
    ]
    for command in ["train", *stages, *others, "play", "replay", "explain", "inspect"]:
        assert f" {command} " in out
        code, help_text, _ = antiphon(command, option)
        assert (code, f"antiphon {command}" in help_text) == (0, True)


def test_tokens_are_added_listed_and_revoked(antiphon: Callable[..., tuple[int, str, str]], task: Path) -> None:
    run = task / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "config.toml").write_text(antiphon("train", "run.toml", "--name", "tiny", "--dry-run")[1])
    assert antiphon("token", str(run))[:2] == (0, "no tokens\n")
    code, token, _ = antiphon("token", str(run), "--add", "ana")
    assert (code, len(token.strip())) == (0, 43)
    assert antiphon("token", str(run))[:2] == (0, "ana\n")
    assert TokenBook(None, run / "tokens.json").name_of(f"Bearer {token.strip()}".encode()) == "ana"
    assert antiphon("token", str(run), "--add", "ana")[0] == 2
    assert antiphon("token", str(run), "--revoke", "ana")[0] == 0
    assert antiphon("token", str(run), "--revoke", "ana")[0] == 2


def test_the_version_is_printed(antiphon: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = antiphon("--version")
    assert (code, out) == (0, f"antiphon {metadata.version('antiphon')}\n")


@pytest.mark.process
def test_the_shell_completes_commands_and_options(task: Path) -> None:
    for words, expected in (
        ("antiphon eval", ["evaluate", "evaluate-rewards"]),
        ("antiphon train --dr", ["--dry-run"]),
    ):
        completing = {"_ANTIPHON_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        command = [sys.executable, "-m", "deploy.cli"]
        environment = {**os.environ, **completing, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
        assert done.stdout.split() == expected, done.stderr


IMPORTS = """
import sys
from deploy.cli import app
try:
    app(sys.argv[1:])
except SystemExit as error:
    assert error.code == 0
assert not {"torch", "ray", "transformers", "vllm"} & set(sys.modules)
"""


@pytest.mark.process
@pytest.mark.parametrize("arguments", [["--help"], ["chat", "--help"], ["check", "run.toml"]], ids=" ".join)
def test_help_and_check_import_neither_torch_nor_ray(task: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-c", IMPORTS, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
