"""GSM8K: reward and metrics, and a short run on a made data set of the same form."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from examples.byte_model import write_byte_model
from examples.gsm8k.scorers import evaluate, reward
from tests.support.paths import ROOT

SOLUTION = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = <<48+24=72>>72 clips.\n#### 72"


@pytest.mark.parametrize("reference", [SOLUTION, "72", "72.0"])
def test_the_number_behind_the_last_mark_counts(reference: str) -> None:
    responses = ["so\n#### 72", "#### 5 no\n#### $72.", "#### 72.00", "#### 1,072", "it is 72", "####", "#### many"]
    assert reward([], responses, references=[reference] * 7) == [1.0, 1.0, 1.0, 0.1, 0.0, 0.0, 0.0]


def test_separators_and_signs_are_read() -> None:
    assert reward([], ["#### 1,072", "#### -3", "#### −3"], references=["#### 1072", "-3", "#### -3"]) == [1.0] * 3


def test_error_if_a_reference_is_no_number() -> None:
    with pytest.raises(ValueError, match="is neither a number nor ends with one behind ####"):
        reward([], ["#### 1"], references=["one"])


def test_metrics_are_shares_and_words() -> None:
    found = evaluate([], ["#### 1", "so #### 2", "3"], references=["1", "1", "1"])
    assert found == pytest.approx({"accuracy": 1 / 3, "answered": 2 / 3, "num_words": 2.0})


def write_data(path: Path, num: int, seed: int) -> list[str]:
    """Write word problems in the form of GSM8K; return their texts."""
    choice, rows = random.Random(seed), []
    for _ in range(num):
        first, second = choice.randint(1, 9), choice.randint(1, 9)
        question = f"Ada has {first} apples and buys {second} more. How many has she?"
        answer = (
            f"She has {first}+{second}=<<{first}+{second}={first + second}>>{first + second}.\n#### {first + second}"
        )
        rows.append({"question": question, "answer": answer})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [text for row in rows for text in row.values()]


@pytest.mark.slow
@pytest.mark.ray
def test_the_run_file_trains_on_data_of_the_same_form(tmp_path: Path) -> None:
    texts = write_data(tmp_path / "train.jsonl", 64, seed=0)
    write_data(tmp_path / "test.jsonl", 16, seed=1)
    write_byte_model(tmp_path / "model", texts, seed=0, max_positions=512)
    lines = [
        f'model.path = "{tmp_path}/model"',
        'model.dtype = "float32"',
        f'data.prompts = "{tmp_path}/train.jsonl"',
        f'data.evaluation = "{tmp_path}/test.jsonl"',
        "rollout_actors = { num_gpus = 0, responses_per_prompt = 4, max_response_tokens = 16 }",
        "rollout_actors.num_concurrent_groups = 4",
        "trajectory_queue.groups_per_step = 4",
        "learner = { num_gpus = 0, num_steps = 2, num_minibatches = 2 }",
        "evaluation = { num_prompts = 8, num_prompts_during = 4 }",
    ]
    command = [sys.executable, "-m", "deploy.cli", "train", "examples/gsm8k/run.toml", "--runs-dir", str(tmp_path)]
    command += [part for line in lines for part in ("--set", line)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "gsm8k" / "summary.json").read_text())
    assert {"accuracy", "answered", "num_words"} <= set(summary["evaluation"]["after"])
