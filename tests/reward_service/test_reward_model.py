from __future__ import annotations

import asyncio
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cluster.errors import InputError, RewardError
from cluster.scoring import Score, ScoreRequest
from reward_service.config import RewardServiceConfig
from reward_service.registry import build_scorer
from reward_service.reward_model import RewardModelScorer

ITEMS = [ScoreRequest(f"7-{i}-0", "say " + "x" * (i % 5), "abc" * (1 + i % 9)) for i in range(40)]


def direct_rewards(folder: Path) -> list[float]:
    """One forward pass a text, with nothing padded."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return [
            model(**tokenizer(item.prompt + item.response + tokenizer.eos_token, return_tensors="pt")).logits.item()
            for item in ITEMS
        ]


async def test_rewards_equal_a_direct_forward_however_they_were_batched(reward_model_folder: Path) -> None:
    scorer = RewardModelScorer(reward_model_folder, max_batch_size=16)
    calls = [scorer.score(ITEMS[start : start + 4]) for start in range(0, len(ITEMS), 4)]
    scores = [score for answer in await asyncio.gather(*calls) for score in answer]
    expected = direct_rewards(reward_model_folder)
    assert len(set(expected)) > 20
    for item, score, reward in zip(ITEMS, scores, expected, strict=True):
        assert isinstance(score, Score)
        assert score.id == item.id
        assert math.isclose(score.reward, reward, rel_tol=0, abs_tol=1e-6)


async def test_a_text_longer_than_the_context_is_an_error_naming_the_item(reward_model_folder: Path) -> None:
    scorer = RewardModelScorer(reward_model_folder)
    good, bad = await scorer.score([ITEMS[0], ScoreRequest("7-9-9", "say ", "a" * 60)])
    assert isinstance(good, Score)
    assert str(bad) == "reward_model: 7-9-9 has 65 tokens; the model reads at most 64"


async def test_a_model_that_gives_no_finite_number_gives_an_error(reward_model_folder: Path) -> None:
    scorer = RewardModelScorer(reward_model_folder)
    with torch.no_grad():
        scorer._model.score.weight.fill_(float("nan"))
    (outcome,) = await scorer.score(ITEMS[:1])
    assert isinstance(outcome, RewardError)
    assert "gave nan for 7-0-0" in outcome.what


def test_the_version_is_a_digest_of_the_weights(reward_model_folder: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(reward_model_folder, tmp_path / "copy")
    first = build_scorer(RewardServiceConfig(), reward_model_folder).version
    assert build_scorer(RewardServiceConfig(), copy).version == first
    tensors = load_file(copy / "model.safetensors")
    tensors["score.weight"] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert build_scorer(RewardServiceConfig(), copy).version != first


def test_a_folder_without_safetensors_is_refused(reward_model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((reward_model_folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(InputError, match=r"^reward_model: no safetensors in "):
        build_scorer(RewardServiceConfig(), tmp_path)


def test_a_classifier_of_two_labels_is_refused(reward_model_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        reward_model_folder, num_labels=2, ignore_mismatched_sizes=True
    )
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(reward_model_folder).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has 2 labels; a reward model has one"):
        build_scorer(RewardServiceConfig(), tmp_path)
