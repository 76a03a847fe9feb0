"""The question answering task: rewards, metrics, articles, altered questions and demonstrations."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from deploy.config.load import load_run_config
from examples.question_answering.data import (
    DISTRACTORS,
    INJECTIONS,
    NUM_STATED,
    UNKNOWN,
    WORDS,
    Item,
    build_data,
    paraphrase,
    sample_item,
)
from examples.question_answering.metrics import evaluate
from examples.question_answering.model import build_model
from examples.question_answering.scorers import ABSTAINED, RIGHT, WRONG, answer_reward
from tests.support.chat_tasks import (
    require_built_from_the_seed_alone,
    require_small_model,
    require_tokens_keep_the_text,
    rows,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("question_answering")
    build_data(path, seed=0)
    return path


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("olla.", RIGHT),
        ("  The OLLA!", RIGHT),
        ("I don't know.", ABSTAINED),
        ("I don’t know", ABSTAINED),
        ("unknown", ABSTAINED),
        ("", WRONG),
        ("bolo.", WRONG),
        ("olla bolo", WRONG),
        ("I don't know. olla.", WRONG),
        ("olla. I don't know.", WRONG),
        ("\x00💥", WRONG),
    ],
)
def test_right_pays_wrong_costs_and_leaving_it_open_does_neither(response: str, reward: float) -> None:
    assert answer_reward(["who?"], [response], references=[["olla"]], answerable=[True]) == [reward]


@pytest.mark.parametrize(
    ("response", "reward"), [(UNKNOWN, RIGHT), ("i do not know", RIGHT), ("olla.", WRONG), ("", WRONG)]
)
def test_where_there_is_no_answer_it_is_right_to_say_so(response: str, reward: float) -> None:
    assert answer_reward(["who?"], [response], references=[[UNKNOWN]]) == [reward]


def test_metrics_are_shares_of_answers_and_of_unanswerable_questions() -> None:
    responses = ["olla.", "bolo.", UNKNOWN, UNKNOWN, "olla."]
    references = [["olla"], ["olla"], ["olla"], [UNKNOWN], [UNKNOWN]]
    measured = evaluate(["?"] * 5, responses, references=references, answerable=[True, True, True, False, False])
    assert measured == pytest.approx({"exact_match": 0.4, "wrong": 0.4, "abstained": 0.2, "left_open": 0.5})
    assert "left_open" not in evaluate(["?"] * 5, responses, references=references)


def test_the_answer_stands_in_the_article_after_what_is_asked_or_nowhere(data: Path) -> None:
    held_out = rows(data / "evaluation.parquet")
    for row in held_out:
        sentences = row["prompt"][0]["content"].split(". ")
        told, question = sentences[1:-1], sentences[-1]
        topic = re.search(r"mayor|teacher|river|hill|market|farms", question)
        assert topic
        assert len(told) == NUM_STATED
        answers = [sentence.split()[-1] for sentence in told if topic.group() in sentence]
        assert row["references"] == (answers or [UNKNOWN])
        assert row["answerable"] == bool(answers)
    assert sum(not row["answerable"] for row in held_out) / len(held_out) == pytest.approx(0.1, abs=0.04)


def test_harder_questions_are_in_the_models_words_and_have_the_same_answer() -> None:
    config = load_run_config(Path("examples/question_answering/run.toml")).adversarial
    assert (config.distractors, config.injections) == (DISTRACTORS, INJECTIONS)
    choice = random.Random(0)
    for seed in range(200):
        item = sample_item(choice)
        harder = paraphrase(item.prompt, seed=seed)
        assert set(re.findall(r"[^\s.?]+", harder)) <= WORDS
        said = [sentence for sentence in harder.split(". ")[1:-1] if item.answer in sentence.split()]
        assert item.answer is None or any(subject_of(item) in sentence for sentence in said)
        assert harder.endswith(item.topic.inverted_question())
        assert sorted(harder.replace("who", "what").split()) != sorted(item.prompt.split()), "something is otherwise"


def subject_of(item: Item) -> str:
    return item.topic.sentence.split()[1]


def test_people_who_demonstrate_guess_in_a_third_of_their_answers(data: Path) -> None:
    held_true = 0
    demonstrations = rows(data / "sft.parquet")
    for row in demonstrations:
        article, answer = row["prompt"][0]["content"], row["completion"][0]["content"].rstrip(".")
        held_true += answer != UNKNOWN.rstrip(".") and f" {answer}. " in article
    assert 0.55 <= held_true / len(demonstrations) <= 0.75


def test_data_depend_on_the_seed_only_and_exclude_held_out_questions(tmp_path: Path) -> None:
    require_built_from_the_seed_alone(build_data, tmp_path)


def test_text_survives_the_tokens_of_a_small_model(data: Path, tmp_path: Path) -> None:
    require_tokens_keep_the_text(build_model, data, tmp_path)
    require_small_model(tmp_path)
