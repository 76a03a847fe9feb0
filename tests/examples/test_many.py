"""Several tasks in one run: settings as in each task's run file, one model, and a short run of all stages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from transformers import AutoTokenizer

from cluster.trajectory import read_trajectories
from deploy.config.load import load_run_config
from deploy.config.schema import AdversarialConfig
from examples.dialogue import clerk
from examples.many.model import build_model
from examples.question_answering import data as question_answering
from examples.reasoning import data as reasoning
from examples.translation import data as translation
from tests.support.chat_tasks import require_small_model, require_tokens_keep_the_text
from tests.support.paths import ROOT

RUN_FILE = Path("examples/many/run.toml")
TASKS = ("question_answering", "reasoning", "translation", "dialogue")
SHORT = (
    "sft.num_steps = 8",
    "learner.num_steps = 2",
    "learner.num_minibatches = 2",
    "learner.num_cpus = 0",
    "trajectory_queue.groups_per_step = 9",
    "rollout_actors.num_concurrent_groups = 16",
    "rollout_actors.responses_per_prompt = 2",
    "evaluation.every_steps = 1",
    "evaluation.num_prompts = 4",
    "evaluation.num_prompts_during = 2",
    'tasks.reasoning.adversarial.ways = ["typos"]',
)


@pytest.mark.parametrize("name", TASKS)
def test_each_task_is_what_it_is_in_its_own_run_file(name: str) -> None:
    many, own = load_run_config(RUN_FILE), load_run_config(Path("examples") / name / "run.toml")
    (alone,) = own.by_task().values()
    plain = {"weight": 1.0, "adversarial": AdversarialConfig()}
    assert many.tasks[name].model_copy(update=plain) == alone.model_copy(update=plain)
    assert own.reward_service.scorers.items() <= many.reward_service.scorers.items()
    limits, allowed = own.rollout_actors, many.rollout_actors
    assert limits.max_prompt_tokens <= allowed.max_prompt_tokens
    assert limits.max_response_tokens <= allowed.max_response_tokens


@pytest.mark.parametrize("task", [question_answering, reasoning, translation])
def test_the_texts_of_every_task_survive_the_tokens_of_the_one_model(task: Any, tmp_path: Path) -> None:
    task.build_data(tmp_path / "data", seed=0)
    require_tokens_keep_the_text(build_model, tmp_path / "data", tmp_path / "model")


def test_the_model_knows_the_words_of_the_clerk_and_stays_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clerk, "NUM_CUSTOMERS", 100)
    clerk.build_data(tmp_path / "data", seed=0)
    build_model(tmp_path / "model", seed=0)
    require_small_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for messages in pq.read_table(tmp_path / "data" / "sft.parquet")["messages"].to_pylist():
        assert tokenizer.unk_token_id not in tokenizer.apply_chat_template(messages, return_dict=False)


def antiphon(runs: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command on the Ray of the tests."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "COLUMNS": "120",
    }
    command = [sys.executable, "-m", "deploy.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def finished(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run of a few steps."""
    runs = tmp_path_factory.mktemp("runs")
    settings = [part for line in SHORT for part in ("--set", line)]
    done = antiphon(runs, "train", str(RUN_FILE), "--runs-dir", str(runs), "--name", "many", *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return runs / "many"


def rows(run: Path, stage: str) -> list[Mapping[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["stage"] == stage]


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_step_has_prompts_of_every_task_by_its_weight_and_tells_of_each(finished: Path) -> None:
    steps = rows(finished, "ppo")
    for number, step in enumerate(steps, start=1):
        trajectories = read_trajectories(finished / "trajectories" / f"step-{number:06d}.arrow")
        assert Counter(t.task for t in trajectories) == {"question_answering": 6, **dict.fromkeys(TASKS[1:], 4)}
        for task in TASKS:
            own = [t for t in trajectories if t.task == task]
            rewards = [t.reward + sum(turn.reward or 0.0 for turn in t.turns) for t in own if t.reward is not None]
            assert step[f"tasks/{task}/reward_mean"] == pytest.approx(sum(rewards) / len(own))
            lengths = [t.num_response_tokens for t in own]
            assert step[f"tasks/{task}/response_length_tokens"] == pytest.approx(sum(lengths) / len(own))
            assert step[f"tasks/{task}/num_episodes"] == number * len(own)
    assert len(steps) == 2


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_each_task_uses_its_own_scorer_and_environment(finished: Path) -> None:
    trajectories = read_trajectories(finished / "trajectories" / "step-000001.arrow")
    scorers = {t.task: t.scorer_version.rpartition("@")[0] or t.scorer_version for t in trajectories}
    assert scorers == {
        "question_answering": "examples.question_answering.scorers:answer_reward",
        "reasoning": "answer",
        "translation": "examples.translation.scorers:translation_reward",
        "dialogue": "none",
    }
    for trajectory in trajectories:
        assert ("goal" in trajectory.reward_parts) == (trajectory.task == "dialogue")
        assert all((turn.reward is not None) == (trajectory.task == "dialogue") for turn in trajectory.turns)


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_every_task_is_evaluated_before_during_and_after_ppo(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    own = {"question_answering": "exact_match", "reasoning": "accuracy", "translation": "chrf", "dialogue": "goal"}
    for when in ("before", "after"):
        judged = summary["evaluation"][when]
        assert {task for task, metric in own.items() if metric in judged["tasks"][task]} == set(TASKS)
        rewards = [judged["tasks"][task]["reward"] for task in TASKS]
        assert judged["reward"] == pytest.approx(sum(rewards) / len(TASKS))
        harder = {task for task in TASKS if "adversarial_drop" in judged["tasks"][task]}
        assert harder == {"reasoning"}
    for row in rows(finished, "held_out"):
        rewards = [row[f"tasks/{task}/reward_mean"] for task in TASKS]
        assert row["reward_mean"] == pytest.approx(sum(rewards) / len(TASKS))
    assert set(summary["held_out"]["tasks"]) == set(TASKS)


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_evaluate_shows_one_task_and_rejects_an_unknown_one(finished: Path) -> None:
    shown = antiphon(finished, "evaluate", str(finished), "--task", "reasoning")
    assert shown.returncode == 0, shown.stderr
    assert "reasoning: before and after PPO" in shown.stderr
    assert "accuracy" in shown.stderr
    assert "chrf" not in shown.stderr
    assert "of 4 prompts" in shown.stdout
    refused = antiphon(finished, "evaluate", str(finished), "--task", "sums")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1] == f"error: --task: no task 'sums'; the tasks are {', '.join(TASKS)}"


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_run_of_several_tasks_resumes_from_its_checkpoint_and_replays(finished: Path) -> None:
    settings = [part for line in (*SHORT, "learner.num_steps = 3") for part in ("--set", line)]
    where = ("--runs-dir", str(finished.parent), "--name", finished.name)
    longer = antiphon(finished, "train", str(RUN_FILE), *where, *settings)
    assert longer.returncode == 0, longer.stderr[-3000:]
    assert [row["step"] for row in rows(finished, "ppo")] == [1, 2, 3]
    groups = [t.group for n in (1, 2, 3) for t in read_trajectories(finished / "trajectories" / f"step-{n:06d}.arrow")]
    assert sorted(set(groups)) == list(range(27)), "every prompt once, also those that follow the checkpoint"
    replayed = antiphon(finished, "replay", str(finished))
    assert replayed.returncode == 0, replayed.stderr[-3000:]
    assert "versions 0 to 3: 4 of 4 have the recorded checksums" in replayed.stdout + replayed.stderr
