"""The trial call of users' scorers: errors name file, line and the expected value."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from cluster.errors import InputError
from cluster.scoring import ScoreRequest
from cluster.user_code import place_of
from reward_service.scorers.trial import Trial, try_functions
from tests.support import scorers

pytestmark = pytest.mark.process
REQUEST = ScoreRequest("trial", "1 + 1?", "", {"references": ["2"]})


def judges_nothing(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return [None for _ in completions]


def needs_solution(completions: list[str], solution: list[str]) -> list[float]:
    return [0.0]


def a_word(solution_str: str, ground_truth: str) -> Any:
    return "good"


def asks_too_long(prompts: list[str], responses: list[str]) -> list[float]:
    raise TimeoutError("the judge is away")


def sleeps(prompts: list[str], responses: list[str]) -> list[float]:
    time.sleep(30)
    return [0.0]


def tried(path: str, timeout_s: float = 60.0) -> list[str]:
    return list(try_functions([Trial({"reward_service.scorer": path}, REQUEST)], timeout_s=timeout_s))


def refused(path: str, timeout_s: float = 60.0) -> tuple[str, str]:
    with pytest.raises(InputError) as caught:
        tried(path, timeout_s)
    return caught.value.where, caught.value.what


@pytest.mark.parametrize("name", ["length", "length_async", "equals_reference"])
def test_scorer_that_returns_a_number_passes(name: str) -> None:
    assert tried(f"tests.support.scorers:{name}") == []


def test_note_if_a_scorer_does_not_apply_to_the_first_prompt() -> None:
    (note,) = tried(f"{__name__}:judges_nothing")
    assert note.startswith(f"{__name__}:judges_nothing does not apply to the first prompt (it returned None)")


def test_error_names_the_columns_that_there_are() -> None:
    where, what = refused(f"{__name__}:needs_solution")
    assert re.fullmatch(r"tests/reward_service/scorers/test_trial.py:\d+", where)
    assert what.startswith(
        "needs 'solution'; there is completion_ids, completions, log_extra, log_metric, prompts, ref"
    )


def test_error_names_the_line_that_raises() -> None:
    where, what = refused("tests.support.scorers:raising")
    line = int(place_of(scorers.raising).rpartition(":")[2])
    assert where == f"tests/support/scorers.py:{line + 1}"
    assert what == "tests.support.scorers:raising raised KeyError: 'no such answer' (for an empty response)"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("too_few", "returned 0 rewards for 1 responses: f(prompts, responses, **columns) returns a list of numbers"),
        ("not_a_list", "returned float, not a list: f(prompts, responses, **columns) returns a list"),
    ],
)
def test_error_states_the_expected_return_value(name: str, what: str) -> None:
    where, message = refused(f"tests.support.scorers:{name}")
    assert where == place_of(getattr(scorers, name))
    assert message.startswith(what)


def test_error_states_the_signature_if_a_value_is_not_a_number() -> None:
    where, what = refused(f"{__name__}:a_word")
    assert re.fullmatch(r"tests/reward_service/scorers/test_trial.py:\d+", where)
    assert what.startswith("returned str 'good', not a number: compute_score(data_source, solution_str")


def test_slow_function_is_distinguished_from_one_raising_TimeoutError() -> None:
    assert "sleeps did not return within 0.1 s" in refused(f"{__name__}:sleeps", 0.1)[1]
    assert "raised TimeoutError: the judge is away" in refused(f"{__name__}:asks_too_long")[1]


def test_missing_function_is_named_by_its_setting() -> None:
    assert refused("tests.support.scorers:nobody")[0] == "reward_service.scorer"
