"""The summarization task: reports, demonstrations, annotators and metrics."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from deploy.config.load import load_run_config
from examples.summarization.annotator import KEY, LENGTH, MADE_UP, annotate, opinions
from examples.summarization.data import (
    LIMIT_WORDS,
    NUM_KEY,
    NUM_SENTENCES,
    build_data,
    demonstrate,
    is_key,
    sample_report,
    sentences_of,
)
from examples.summarization.metrics import evaluate
from examples.summarization.model import build_model
from reward_service.config.scorers import LengthConfig
from tests.support.chat_tasks import (
    require_built_from_the_seed_alone,
    require_small_model,
    require_tokens_keep_the_text,
    rows,
)

REPORT = "<s><user>summarize: lunch was late. sales rose sharply. debts fell again. music seemed mild.<assistant>"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("summarization")
    build_data(path, seed=0)
    return path


def test_reference_is_the_key_sentences_and_fits_the_limit(data: Path) -> None:
    for row in rows(data / "evaluation.parquet"):
        report = sentences_of(row["prompt"][0]["content"])
        assert (len(report), len(set(report))) == (NUM_SENTENCES, NUM_SENTENCES)
        (reference,) = row["references"]
        assert sentences_of(reference) == [sentence for sentence in report if is_key(sentence)]
        assert len(sentences_of(reference)) == NUM_KEY
        assert len(reference.split()) <= LIMIT_WORDS


def test_the_run_files_rule_has_the_limit_of_the_metrics() -> None:
    service = load_run_config(Path("examples/summarization/run.toml")).reward_service
    length = service.scorers["length"]
    assert isinstance(length, LengthConfig)
    assert (length.max, length.unit) == (LIMIT_WORDS, "words")
    assert service.needs_reward_model()


def test_demonstrations_take_key_and_other_sentences_of_the_report() -> None:
    choice = random.Random(0)
    num_key = num_said = 0
    for _ in range(1000):
        report = sample_report(choice)
        said = sentences_of(demonstrate(report, choice))
        assert set(said) <= set(report)
        assert 2 <= len(said) <= 4
        num_key, num_said = num_key + sum(map(is_key, said)), num_said + len(said)
    assert 0.4 <= num_key / num_said <= 0.7


@pytest.mark.parametrize(
    ("summary", "opinion"),
    [
        ("sales rose sharply. debts fell again.", 2 * (KEY + LENGTH)),
        ("sales rose sharply. sales rose sharply.", KEY + 2 * LENGTH),
        ("lunch was late.", LENGTH),
        ("wages rose sharply.", LENGTH + MADE_UP),
        ("sales sales sales", 0),
        ("", 0),
        ("\x00💥", 0),
    ],
)
def test_people_count_figures_and_length_and_see_what_is_made_up(summary: str, opinion: float) -> None:
    assert opinions([REPORT], [summary]) == [opinion]


def test_annotators_err_by_bradley_terry_and_repeat_with_the_same_seed() -> None:
    prompts, good, bad = [REPORT] * 3000, ["sales rose sharply."] * 3000, ["lunch was late."] * 3000
    labels = annotate(prompts, bad, good, seed=1)
    assert sum(labels) / 3000 == pytest.approx(0.818, abs=0.02)  # sigmoid(KEY)
    assert labels == annotate(prompts, bad, good, seed=1) != annotate(prompts, bad, good, seed=2)


def test_metrics_tell_length_and_what_is_made_up() -> None:
    wanted = "sales rose sharply. debts fell again."
    long = f"{wanted} lunch was late. music seemed mild."
    measured = evaluate([REPORT] * 3, [wanted, long, "wages rose sharply."], references=[[wanted]] * 3)
    assert measured["num_words"] == pytest.approx((6 + 12 + 3) / 3)
    assert measured["within_limit"] == pytest.approx(2 / 3)
    assert measured["faithful"] == pytest.approx(6 / 7)
    assert 0.5 < measured["rouge_l"] < 0.9
    assert evaluate([REPORT], [""], references=[[wanted]])["rouge_l"] == 0


def test_data_follow_from_the_seed_and_held_out_reports_are_not_trained_on(tmp_path: Path) -> None:
    require_built_from_the_seed_alone(build_data, tmp_path)


def test_text_survives_the_tokens_of_a_small_model(data: Path, tmp_path: Path) -> None:
    require_tokens_keep_the_text(build_model, data, tmp_path)
    require_small_model(tmp_path)
