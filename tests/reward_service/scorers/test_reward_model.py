from __future__ import annotations

import asyncio
import math
import pickle
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cluster.errors import InputError, RewardError
from cluster.scoring import Score, ScoreRequest
from reward_service.config.service import RewardServiceConfig
from reward_service.scorers.files import member_folders
from reward_service.scorers.reward_model import RewardModelScorer, batches_by_length
from tests.support.building import build_scorer

ITEMS = [ScoreRequest(f"7-{i}-0", "say " + "x" * (i % 5), "abc" * (1 + i % 9)) for i in range(40)]


def direct_rewards(folder: Path) -> list[float]:
    """Compute each reward in a separate forward pass without padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return [
            model(**tokenizer(item.prompt + item.response + tokenizer.eos_token, return_tensors="pt")).logits.item()
            for item in ITEMS
        ]


async def test_rewards_equal_a_direct_forward_for_any_batching(reward_model_folder: Path) -> None:
    scorer = RewardModelScorer(reward_model_folder, max_batch_size=16)
    calls = [scorer.score(ITEMS[start : start + 4]) for start in range(0, len(ITEMS), 4)]
    scores = [score for answer in await asyncio.gather(*calls) for score in answer]
    expected = direct_rewards(reward_model_folder)
    assert len(set(expected)) > 20
    for item, score, reward in zip(ITEMS, scores, expected, strict=True):
        assert isinstance(score, Score)
        assert score.id == item.id
        assert math.isclose(score.reward, reward, rel_tol=0, abs_tol=1e-6)


async def test_error_names_the_item_if_its_text_exceeds_the_context(reward_model_folder: Path) -> None:
    scorer = RewardModelScorer(reward_model_folder)
    good, bad = await scorer.score([ITEMS[0], ScoreRequest("7-9-9", "say ", "a" * 60)])
    assert isinstance(good, Score)
    assert str(bad) == "reward_model: 7-9-9 has 65 tokens; the model reads at most 64"


async def test_error_if_the_model_returns_no_finite_number(reward_model_folder: Path) -> None:
    scorer = RewardModelScorer(reward_model_folder)
    with torch.no_grad():
        scorer._models[0].score.weight.fill_(float("nan"))
    (outcome,) = await scorer.score(ITEMS[:1])
    assert isinstance(outcome, RewardError)
    assert "gave nan for 7-0-0" in outcome.what


def test_the_version_is_a_digest_of_the_weights(reward_model_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(reward_model_folder, tmp_path / "copy")
    first = build_scorer(RewardServiceConfig(), reward_model_folder).version
    assert build_scorer(RewardServiceConfig(), copy).version == first
    tensors = load_file(copy / "model.safetensors")
    tensors["score.weight"] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert build_scorer(RewardServiceConfig(), copy).version != first


def test_folder_without_safetensors_is_rejected(reward_model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((reward_model_folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(InputError, match=r"^reward_model: no usable weights: .* AutoModelForSequenceClassification "):
        build_scorer(RewardServiceConfig(), tmp_path)


def test_classifier_with_two_labels_is_rejected(reward_model_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        reward_model_folder, num_labels=2, ignore_mismatched_sizes=True
    )
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(reward_model_folder).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has 2 labels; a reward model has one"):
        build_scorer(RewardServiceConfig(), tmp_path)


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 400))
def test_batches_have_every_text_once_within_the_token_limit(lengths: list[int], most: int) -> None:
    batches = list(batches_by_length(lengths, max_tokens=most))
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[place] for place in batch) <= most
    longest = [max(lengths[place] for place in batch) for batch in batches]
    assert longest == sorted(longest)


def test_long_text_does_not_pad_short_ones() -> None:
    batches = list(batches_by_length([*[5] * 255, 2000], max_tokens=16384))
    assert [len(batch) for batch in batches] == [255, 1]


@pytest.mark.parametrize("max_batch_tokens", [1, 100, 100_000])
async def test_rewards_do_not_depend_on_the_tokens_per_pass(reward_model_folder: Path, max_batch_tokens: int) -> None:
    scorer = RewardModelScorer(reward_model_folder, max_batch_tokens=max_batch_tokens)
    scores = await scorer.score(ITEMS)
    for score, reward in zip(scores, direct_rewards(reward_model_folder), strict=True):
        assert isinstance(score, Score)
        assert math.isclose(score.reward, reward, rel_tol=0, abs_tol=1e-6)
    scorer.close()


def with_members(folder: Path, target: Path, num: int) -> Path:
    """Copy the model and add members with different heads."""
    shutil.copytree(folder, target)
    for number in range(1, num + 1):
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        with torch.no_grad():
            model.score.weight.mul_(1.0 + number)
        model.save_pretrained(target / f"member-{number}")
    return target


async def test_ensemble_returns_its_members_mean_and_uncertainty(reward_model_folder: Path, tmp_path: Path) -> None:
    folder = with_members(reward_model_folder, tmp_path / "ensemble", 2)
    scorer = RewardModelScorer(folder, name="helpful")
    for score, reward in zip(await scorer.score(ITEMS), direct_rewards(reward_model_folder), strict=True):
        assert isinstance(score, Score)
        members = [reward, 2 * reward, 3 * reward]
        assert math.isclose(score.reward, statistics.mean(members), abs_tol=3e-6)
        assert set(score.parts) == {"reward_model", "uncertainty"}
        assert score.parts["reward_model"] == score.reward
        assert math.isclose(score.parts["uncertainty"], statistics.pstdev(members), abs_tol=3e-6)
    assert scorer.version.startswith("helpful@")


def test_the_version_of_an_ensemble_is_a_digest_of_all_its_members(reward_model_folder: Path, tmp_path: Path) -> None:
    folders = [with_members(reward_model_folder, tmp_path / str(num), num) for num in (0, 1, 2)]
    assert len({RewardModelScorer(folder).version for folder in folders}) == 3


def test_missing_member_is_named(tmp_path: Path) -> None:
    for name in ("member-1", "member-3"):
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="has member-1, member-3 but no member-2"):
        member_folders(tmp_path)
    (tmp_path / "member-2").mkdir()
    assert [path.name for path in member_folders(tmp_path)] == ["member-1", "member-2", "member-3"]


@pytest.mark.parametrize("where", [".", "member-1"])
def test_weights_that_are_not_safetensors_are_rejected_unread(
    reward_model_folder: Path, tmp_path: Path, where: str
) -> None:
    folder = with_members(reward_model_folder, tmp_path / "model", 1)
    (folder / where / "pytorch_model.bin").write_bytes(pickle.dumps(print))
    with pytest.raises(InputError, match=r"pytorch_model\.bin is not safetensors"):
        RewardModelScorer(folder)


class Planted:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (self.path, "w"))


def test_pickle_named_safetensors_is_rejected_without_unpickling(reward_model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(reward_model_folder, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(pickle.dumps(Planted(str(tmp_path / "ran"))))
    with pytest.raises(InputError, match=r"^reward_model: cannot load"):
        RewardModelScorer(folder)
    assert not (tmp_path / "ran").exists()


def test_conversation_is_rendered_by_the_models_chat_template(reward_model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(reward_model_folder, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    scorer = RewardModelScorer(folder)
    messages = [{"role": "user", "content": "say"}]
    asked = [ScoreRequest("a", "", "abc", {"messages": messages}), ScoreRequest("b", "", "abc", {"messages": 1})]
    good, bad = scorer.score_batch(asked)
    (direct,) = scorer.score_batch([ScoreRequest("a", "say ", "abc")])
    assert isinstance(good, Score)
    assert isinstance(direct, Score)
    assert good.reward == pytest.approx(direct.reward, abs=1e-6)
    assert isinstance(bad, RewardError)
    (without,) = RewardModelScorer(reward_model_folder).score_batch(asked[:1])
    assert isinstance(without, RewardError)
    assert "has no chat template" in without.what
