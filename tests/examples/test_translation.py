"""The translation task: the two languages, demonstrations, reward and metrics."""

from __future__ import annotations

import importlib
import random
from pathlib import Path

import pytest

from cluster.errors import InputError
from examples import text_metrics
from examples.text_metrics import rouge_l
from examples.translation.data import (
    ADJECTIVES,
    LEXICON,
    NOUNS,
    TIMES,
    VERBS,
    Phrase,
    Sentence,
    build_data,
    demonstrate,
    sample_sentence,
)
from examples.translation.metrics import evaluate
from examples.translation.model import build_model
from examples.translation.scorers import translation_reward
from tests.support.chat_tasks import (
    require_built_from_the_seed_alone,
    require_small_model,
    require_tokens_keep_the_text,
)

SENTENCE = Sentence(Phrase(0, True, 1), 2, Phrase(9, False, 3), 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("translation")
    build_data(path, seed=0)
    return path


def test_no_word_means_two_things() -> None:
    for language in (0, 1):
        assert len({pair[language] for pair in LEXICON}) == len(LEXICON)


def test_the_languages_differ_in_order_and_the_second_one_agrees() -> None:
    nouns, adjectives, verbs, times = NOUNS, ADJECTIVES, VERBS, TIMES
    subject, object_ = f"{adjectives[1][0]} {nouns[0][0]}en", f"{adjectives[3][0]} {nouns[9][0]}"
    assert SENTENCE.source == f"{subject} {verbs[2][0]} {object_} {times[0][0]}."
    subject, object_ = f"{nouns[0][1]}i {adjectives[1][1]}ai", f"{nouns[9][1]} {adjectives[3][1]}o"
    assert SENTENCE.target == f"{times[0][1]} {subject} {object_} {verbs[2][1]}ai."


def test_people_who_demonstrate_err_in_about_six_of_ten_sentences() -> None:
    choice = random.Random(0)
    sentences = [sample_sentence(choice) for _ in range(4000)]
    said = [demonstrate(sentence, choice) for sentence in sentences]
    right = sum(each == sentence.target for each, sentence in zip(said, sentences, strict=True)) / len(said)
    assert 0.35 <= right <= 0.5
    assert all(len(each.split()) == len(s.target.split()) for each, s in zip(said, sentences, strict=True))


def test_a_reward_is_the_higher_the_nearer_a_translation_is() -> None:
    wrong_ending = SENTENCE.worded("ai", "oi", "ai")
    wrong_order = SENTENCE.worded("ai", "o", "ai", misplaced="verb")
    said = [SENTENCE.target, wrong_ending, wrong_order, SENTENCE.source, "", "\x00💥"]
    rewards = translation_reward(["?"] * 6, said, references=[[SENTENCE.target]] * 6, level=[1] * 6)
    assert rewards[0] == 1.0
    assert 1.0 > min(rewards[1:3]) > rewards[3] > 0.0
    assert rewards[4:] == [0.0, 0.0]


def test_metrics_are_of_the_corpus_and_tell_order_from_words() -> None:
    said = [SENTENCE.target, SENTENCE.worded("ai", "o", "ai", misplaced="adjectives"), ""]
    measured = evaluate(["?"] * 3, said, references=[SENTENCE.target] * 3)
    assert (measured["exact"], measured["right_words"]) == pytest.approx((1 / 3, 2 / 3))
    assert 33 < measured["chrf"] < 100


def test_rouge_l_takes_the_best_of_several_references() -> None:
    assert rouge_l(["the plant closed", ""], [["sales fell", "the plant closed"], "sales fell"]) == 0.5


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    text_metrics._chrf.cache_clear()
    with pytest.raises(InputError, match=r"sacrebleu: is not installed: pip install 'antiphon\[examples\]'"):
        translation_reward(["?"], ["a"], references=["a"])


def test_data_depend_on_the_seed_only_and_exclude_held_out_sentences(tmp_path: Path) -> None:
    require_built_from_the_seed_alone(build_data, tmp_path)


def test_text_survives_the_tokens_of_a_small_model(data: Path, tmp_path: Path) -> None:
    require_tokens_keep_the_text(build_model, data, tmp_path)
    require_small_model(tmp_path)
