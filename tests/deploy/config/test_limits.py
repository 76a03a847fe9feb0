"""Lengths that no model of the run can read are refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.errors import InputError
from deploy.config.limits import check_limits
from deploy.config.load import load_run_config

RUN = """
[run]
stages = ["sft", "preferences", "reward_model", "ppo"]
[model]
path = "model"
[data]
sft = "sft.parquet"
prompts = "prompts.jsonl"
[preferences]
annotator = "package:annotate"
[rollout_actors]
max_prompt_tokens = 9
max_response_tokens = 16
[reward_service]
scorer = "package:score"
"""
OTHER_MODEL = """
[reward_service.scorers.other]
kind = "reward_model"
path = "other"
"""


def refusal(folder: Path, context: int, *overrides: str, more: str = "") -> str:
    """Return the error of a run whose model has this context, or an empty text."""
    (folder / "run.toml").write_text(RUN + more)
    config = load_run_config(folder / "run.toml", overrides)
    try:
        check_limits(config, {"max_position_embeddings": context}, Path("model"))
    except InputError as error:
        return str(error)
    return ""


def test_a_context_of_exactly_prompt_and_response_is_enough(tmp_path: Path) -> None:
    assert refusal(tmp_path, 25) == ""
    assert "9 max_prompt_tokens + 16 = 25 tokens, but max_position_embeddings of model is 24" in refusal(tmp_path, 24)


def test_a_reward_model_needs_room_for_the_end_of_sequence(tmp_path: Path) -> None:
    scored = 'reward_service.scorer = "reward_model"'
    assert refusal(tmp_path, 26, scored) == ""
    assert "26 tokens for the scorer reward_model, but max_position_embeddings of model is 25" in refusal(
        tmp_path, 25, scored
    )


def test_the_context_of_another_reward_model_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other").mkdir()
    Path("other/config.json").write_text(json.dumps({"n_positions": 20}))
    assert refusal(tmp_path, 64, more=OTHER_MODEL) == ""
    refused = refusal(tmp_path, 64, 'reward_service.scorer = "other"', more=OTHER_MODEL)
    assert "26 tokens for the scorer other, but max_position_embeddings of" in refused


@pytest.mark.parametrize("section", ["sft", "reward_model"])
def test_examples_longer_than_the_context_are_refused(tmp_path: Path, section: str) -> None:
    assert refusal(tmp_path, 32, f"{section}.max_tokens = 32") == ""
    refused = refusal(tmp_path, 32, f"{section}.max_tokens = 33")
    assert refused == f"{section}.max_tokens: 33 tokens, but max_position_embeddings of model is 32"
