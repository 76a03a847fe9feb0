"""Tasks of reasoning-gym by name: data, scores, lessons in order, and a tokenizer for any text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cluster.errors import InputError
from deploy.config.load import load_run_config
from tests.support.chat_tasks import rows
from tests.support.paths import ROOT

pytest.importorskip("reasoning_gym", reason="the extra reasoning-gym is not installed")
from examples.reasoning_gym.data import build_data
from examples.reasoning_gym.model import build_model
from examples.reasoning_gym.scorers import evaluate, reward

SUMS = {"chain_sum": {"max_terms": 2, "max_digits": 1}}
WORDS = ["spell_backward", "letter_counting"]


def build(folder: Path, **settings: Any) -> Path:
    build_data(folder, seed=0, num_demonstrations=20, num_training=24, num_held_out=10, **settings)
    return folder


def columns(path: Path) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows(path)] for name in ("task", "settings", "seed", "number")}


@pytest.mark.parametrize("tasks", [SUMS, WORDS, ["gcd", "syllogism", "number_sorting", "simple_equations"]])
def test_the_packages_own_answers_earn_the_whole_reward(tasks: Any, tmp_path: Path) -> None:
    evaluation = build(tmp_path, tasks=tasks) / "evaluation.parquet"
    answers = [row["references"] for row in rows(evaluation)]
    given = columns(evaluation)
    assert reward([], answers, **given) == [1.0] * 10
    tagged = [f"let me think <answer>{answer}</answer>" for answer in answers]
    assert reward([], tagged, **given) == [1.0] * 10
    assert all(value < 1 for value in reward([], ["no idea"] * 10, **given))


def test_metrics_are_shares_of_right_answers_by_task(tmp_path: Path) -> None:
    evaluation = build(tmp_path, tasks=WORDS) / "evaluation.parquet"
    answers = [row["references"] if row["task"] == WORDS[0] else "no" for row in rows(evaluation)]
    assert evaluate([], answers, **columns(evaluation)) == {
        "accuracy": 0.5,
        "accuracy.spell_backward": 1.0,
        "accuracy.letter_counting": 0.0,
    }


def test_no_question_is_in_two_data_sets_and_the_seed_decides(tmp_path: Path) -> None:
    first, second = (build(tmp_path / name, tasks=SUMS) for name in "ab")
    names = ("sft", "prompts", "evaluation")
    assert [rows(first / f"{name}.parquet") for name in names] == [rows(second / f"{name}.parquet") for name in names]
    questions = [row["prompt"][0]["content"] for name in names for row in rows(first / f"{name}.parquet")]
    assert len(set(questions)) == len(questions) == 54


def test_lessons_come_in_order(tmp_path: Path) -> None:
    lessons = [{"chain_sum": {"max_terms": 2}}, {"chain_sum": {"max_terms": 3}, "spell_backward": {}}, WORDS]
    training = rows(build(tmp_path, lessons=lessons) / "prompts.parquet")
    by_lesson = [[(row["task"], row["settings"]) for row in training[start : start + 8]] for start in (0, 8, 16)]
    sums = [("chain_sum", f'{{"max_terms": {num}}}') for num in (2, 3)]
    assert [set(lesson) for lesson in by_lesson] == [
        {sums[0]},
        {sums[1], ("spell_backward", "{}")},
        {("spell_backward", "{}"), ("letter_counting", "{}")},
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["no_such_task"]}, "has no task 'no_such_task'; it has ab, "),
        ({"tasks": {"gcd": {"no_such": 1}}}, "gcd: .*no_such"),
        ({"tasks": {"chain_sum": {"max_terms": 2, "max_digits": 1}}, "num_held_out": 1000}, "too few different"),
        ({}, "give tasks or lessons"),
    ],
)
def test_error_names_the_task_or_setting(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        build_data(tmp_path, **{"seed": 0, "num_demonstrations": 4, "num_training": 4, **settings})


def test_the_tokenizer_keeps_any_text_and_makes_digits_tokens(tmp_path: Path) -> None:
    build_model(tmp_path, seed=0, tasks=SUMS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("State 12 + 3 =", "¿Qué? 東京\n\t{}"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("1234")) == 4


@pytest.mark.parametrize("name", ["run", "curriculum"])
def test_the_run_files_are_valid(name: str) -> None:
    load_run_config(ROOT / "examples" / "reasoning_gym" / f"{name}.toml")
