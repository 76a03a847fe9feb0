"""`antiphon evaluate` on evaluated runs: what it shows for several tasks and for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from deploy.cli import app
from deploy.config.load import load_run_config
from deploy.evaluation import answers as stored
from deploy.evaluation.answers import Answer
from deploy.run.open import open_run

MODEL = '[run]\nstages = ["ppo"]\n[model]\nbuilder = "task:build"\n'
ALONE = MODEL + '[data]\nbuilder = "task:build"\n[reward_service]\nscorer = "task:score"\n'
SEVERAL = MODEL + "".join(
    f'[tasks.{name}]\nbuilder = "task:build"\nscorer = "task:score"\n' for name in ("sums", "games")
)
Answers = Mapping[str, Sequence[float]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`run(name, text, before, after)` makes an evaluated run with these rewards of each task's prompts."""
    monkeypatch.chdir(tmp_path)
    Path("task.py").write_text("def build(directory, *, seed): ...\ndef score(prompts, responses): ...\n")

    def make(name: str, text: str, before: Answers, after: Answers) -> str:
        Path("run.toml").write_text(text)
        config = load_run_config(Path("run.toml"), [f'run.name = "{name}"', "learner.num_steps = 1"])
        with open_run(config, Path("runs") / name) as directory:
            for folder in ("checkpoints/ppo/step-000001", "policy"):
                (directory.path / folder).mkdir(parents=True)
            (directory.path / "policy" / "config.json").write_text("{}")
            for when, of_tasks in (("before", before), ("after", after)):
                answers = [
                    Answer(row, 0, f"{task or 'sums'} {row}", "response", reward, task=task)
                    for task, rewards in of_tasks.items()
                    for row, reward in enumerate(rewards)
                ]
                stored.write(directory.path / "evaluation" / f"{when}.parquet", answers)
                means = {task: sum(rewards) / len(rewards) for task, rewards in of_tasks.items()}
                shown = {f"evaluation.{when}.tasks.{task}.reward": mean for task, mean in means.items() if task}
                directory.update_summary({f"evaluation.{when}.reward": 0.0, **shown})
        return f"runs/{name}"

    return make


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app(["evaluate", *arguments])
        return int(str(ended.value.code)), *capsys.readouterr()

    return call


BEFORE: Answers = {"sums": [0.0, 0.5], "games": [1.0, 1.0, 1.0]}
AFTER: Answers = {"sums": [1.0, 0.5], "games": [1.0, 0.0, 1.0]}


def test_evaluate_shows_all_tasks_or_only_the_named_one(
    run: Callable[..., str], evaluate: Callable[..., tuple[int, str, str]]
) -> None:
    path = run("many", SEVERAL, BEFORE, AFTER)
    code, out, err = evaluate(path)
    assert code == 0
    assert [name in err for name in ("sums: before", "games: before")] == [True, True]
    assert out.startswith("reward +0.000 against before PPO")
    code, out, err = evaluate(path, "--task", "sums")
    assert code == 0
    assert [name in err for name in ("sums: before", "games: before")] == [True, False]
    assert out.startswith("reward +0.500 against before PPO")
    assert "worse on 0 of 2 prompts" in out
    assert "worse on 1 of 3 prompts" in evaluate(path, "--task", "games")[1]


def test_evaluate_compares_a_task_with_the_same_task_of_another_run(
    run: Callable[..., str], evaluate: Callable[..., tuple[int, str, str]]
) -> None:
    path = run("many", SEVERAL, BEFORE, AFTER)
    own = run("own", ALONE, {"": [0.0, 0.0]}, {"": [1.0, 1.0]})
    other = run("other", SEVERAL, BEFORE, BEFORE)
    assert evaluate(path, "--task", "sums", "--against", own)[1].startswith("reward -0.250 against own's")
    assert evaluate(path, "--task", "sums", "--against", other)[1].startswith("reward +0.500 against other's")
    code, _, err = evaluate(path, "--against", own)
    assert (code, "has answers to none of the same prompts" in err) == (2, True)


def test_evaluate_against_compares_only_the_prompts_that_both_answered(
    run: Callable[..., str], evaluate: Callable[..., tuple[int, str, str]]
) -> None:
    own = run("own", ALONE, {"": [0.0] * 4}, {"": [1.0] * 4})
    fewer = run("fewer", ALONE, {"": [0.0] * 2}, {"": [0.25] * 2})
    out = evaluate(own, "--against", fewer)[1]
    assert out.startswith("reward +0.750 against fewer's on the 2 prompts that both answered, of 4 and 2 (95 %")
    assert "worse on 0 of 2 prompts" in out
    assert "both answered" not in evaluate(own)[1]


def test_evaluate_of_a_model_folder_asks_for_prompts_and_scorer(
    run: Callable[..., str], evaluate: Callable[..., tuple[int, str, str]]
) -> None:
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    code, _, err = evaluate("model")
    assert (code, "name a run file, and the model with --policy" in err) == (2, True)
    own = run("own", ALONE, {"": [0.0]}, {"": [1.0]})
    for options, what in (
        (("--policy", "runs"), "--policy: runs is no model folder"),
        (("--policy", "model", "--best"), "--best: model is a model folder, which has a single policy"),
        (("--step", "7"), "--step: "),
        (("--best",), "has evaluated no checkpoint yet"),
        (("--policy", "model", "--fresh"), "--fresh: would delete the run"),
    ):
        code, _, err = evaluate(own, *options)
        assert (code, what in err) == (2, True), err


def test_evaluate_lists_the_tasks_if_the_name_is_unknown(
    run: Callable[..., str], evaluate: Callable[..., tuple[int, str, str]]
) -> None:
    path = run("many", SEVERAL, BEFORE, AFTER)
    code, out, err = evaluate(path, "--task", "chess")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == "error: --task: no task 'chess'; the tasks are sums, games"
    own = run("own", ALONE, {"": [0.0, 0.0]}, {"": [1.0, 1.0]})
    assert evaluate(own, "--task", "sums")[2].splitlines()[-1] == "error: --task: no task 'sums'; the tasks are own"
    assert evaluate(own, "--task", "own")[1].startswith("reward +1.000 against before PPO")
