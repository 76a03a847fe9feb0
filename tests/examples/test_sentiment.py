"""The sentiment task: days, costs of errors, metrics and demonstrations."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from examples.sentiment.data import (
    MISSED_ALARMS,
    NEWS,
    WRONG_LABELS,
    Day,
    build_data,
    note,
    row,
    sample_day,
)
from examples.sentiment.metrics import evaluate, macro_f1
from examples.sentiment.model import build_model
from examples.sentiment.scorers import FALSE_ALARM, MISSED_ALARM, SCALE, WRONG_LABEL, note_reward, read_note
from tests.support.chat_tasks import (
    require_built_from_the_seed_alone,
    require_small_model,
    require_tokens_keep_the_text,
)

DAY = Day(
    ("oil", "wool", "tin"), ("up", "down", "up"), ("slumps", "idles", "soars"), ("negative", "neutral", "positive")
)
LABELLED = "oil negative, wool neutral, tin positive."
RIGHT = "oil negative alarm, wool neutral, tin positive."


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sentiment")
    build_data(path, seed=0)
    return path


def columns(*days: Day) -> dict[str, Any]:
    return {name: [row(day)[name] for day in days] for name in ("topics", "labels", "turned")}


def test_prompt_tells_the_day_before_and_turned_marks_rises_that_fall() -> None:
    assert DAY.prompt == "before: oil up, wool down, tin up. news: oil slumps, wool idles, tin soars."
    assert DAY.turned == [True, False, False]
    assert len({word for words in NEWS.values() for word in words}) == 18


@pytest.mark.parametrize(
    ("response", "costs"),
    [
        (RIGHT, 0),
        ("Oil: Negative - ALARM!; wool is neutral\ntin positive", 0),
        (LABELLED, MISSED_ALARM),
        ("oil negative no alarm, wool neutral, tin positive.", MISSED_ALARM),
        ("oil negative alarm, wool neutral, tin positive alarm.", FALSE_ALARM),
        ("oil negative, wool neutral alarm, tin positive.", MISSED_ALARM + FALSE_ALARM),
        ("oil positive alarm, wool neutral, tin positive.", WRONG_LABEL),
        ("oil alarm, wool neutral, tin positive.", WRONG_LABEL),
        ("oil negative positive alarm, wool neutral, tin positive.", WRONG_LABEL),
        ("oil alarm, wool alarm, tin alarm.", 3 * WRONG_LABEL + 2 * FALSE_ALARM),
        ("", 3 * WRONG_LABEL + MISSED_ALARM),
        ("oily negative woolpositive \x00💥", 3 * WRONG_LABEL + MISSED_ALARM),
    ],
)
def test_every_error_has_its_cost(response: str, costs: float) -> None:
    assert note_reward(["?"], [response], **columns(DAY), level=[1]) == [-costs / SCALE]


def test_of_two_things_said_of_a_topic_the_first_counts() -> None:
    note = read_note("oil negative, oil positive alarm. tin alarm.", DAY.topics)
    assert note == (["negative", None, None], [False, False, True])


def test_metrics_are_cost_labels_and_alarms() -> None:
    responses = [RIGHT, "oil negative, wool neutral, tin positive alarm.", ""]
    measured = evaluate(["?"] * 3, responses, **columns(DAY, DAY, DAY))
    assert measured["cost"] == pytest.approx((0 + MISSED_ALARM + FALSE_ALARM + 3 * WRONG_LABEL + MISSED_ALARM) / 3)
    assert measured["macro_f1"] == pytest.approx(0.8)
    assert (measured["missed_alarms"], measured["false_alarms"]) == pytest.approx((2 / 3, 1 / 2))


def test_macro_f1_weighs_every_label_the_same() -> None:
    right = ["positive"] * 8 + ["negative"] * 2
    assert macro_f1(right, right) == 1
    assert macro_f1(["positive"] * 10, right) == pytest.approx((16 / 18) / 2)
    assert macro_f1([None] * 10, right) == 0


def test_analysts_err_as_often_as_they_should() -> None:
    choice = random.Random(0)
    days = [sample_day(choice) for _ in range(4000)]
    measured = evaluate(["?"] * 4000, [note(day, choice) for day in days], **columns(*days))
    assert measured["macro_f1"] == pytest.approx(1 - WRONG_LABELS, abs=0.02)
    assert measured["missed_alarms"] == pytest.approx(MISSED_ALARMS, abs=0.03)
    assert 0.1 < measured["false_alarms"] < 0.3


def test_data_follow_from_the_seed_and_held_out_days_are_not_trained_on(tmp_path: Path) -> None:
    require_built_from_the_seed_alone(build_data, tmp_path)


def test_text_survives_the_tokens_of_a_small_model(data: Path, tmp_path: Path) -> None:
    require_tokens_keep_the_text(build_model, data, tmp_path)
    require_small_model(tmp_path)
