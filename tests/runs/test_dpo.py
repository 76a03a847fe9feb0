"""A run of DPO alone: Ray's learner group trains on pairs, vLLM samples both policies, and it is done once."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from deploy import api
from deploy.run.artifacts import newest_policy
from tests.deploy.test_api import in_another_process
from tests.support.paths import LETTERS, ROOT

NUM_PAIRS = 256


def write_pairs(path: Path) -> None:
    """Write pairs of the letters task, in which the response with more a was chosen."""
    choice, lines = random.Random(0), list[str]()
    for _ in range(NUM_PAIRS):
        prompt = "".join(choice.choices("bcdefgh", k=8)) + ":"
        chosen, rejected = ("".join(choice.choices(letters, k=16)) for letters in ("aab", "bcdefgh"))
        lines.append(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")
    path.write_text("".join(lines))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_of_dpo_alone_trains_and_evaluates_the_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    write_pairs(tmp_path / "pairs.jsonl")
    lines = [
        f"run.runs_dir = {json.dumps(str(tmp_path))}",
        'run.stages = ["dpo", "evaluation"]',
        f"data.preferences = {json.dumps(str(tmp_path / 'pairs.jsonl'))}",
        "dpo = { num_steps = 60, batch_size = 32, learning_rate = 3e-3, held_out_share = 0.1 }",
        "evaluation.num_prompts = 32",
    ]
    in_another_process(run_dpo, lines, tmp_path)


def run_dpo(lines: list[str], folder: Path) -> None:
    config, steps = api.load(LETTERS, lines), list[int]()
    run = api.run(config, on_step=lambda stage, metrics: steps.append(metrics["step"]))
    summary = run.summary()
    assert steps == list(range(1, 61))
    assert summary["dpo"]["held_out_accuracy"] == 1.0
    assert newest_policy(config, run).folder == folder / "letters" / "dpo"
    before, after = (summary["evaluation"][when]["reward"] for when in ("before", "after"))
    assert after > before
    assert summary["evaluation"]["after"]["kl_nats"] > 1
    assert not (run.path / "checkpoints" / "dpo").exists()
    assert api.run(config, on_step=lambda stage, metrics: steps.append(metrics["step"])).path == run.path
    assert len(steps) == 60, "a finished run starts nothing"
