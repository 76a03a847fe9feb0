"""The trial call of users' scorers: errors name file, line and the expected value."""

from __future__ import annotations

import re
import signal
import time
from typing import Any

import pytest

from cluster.errors import InputError
from cluster.scoring import ScoreRequest
from cluster.user_code import place_of
from reward_service.scorers.trial import Trial, try_functions
from tests.support import scorers

REQUEST = ScoreRequest("trial", "1 + 1?", "", {"references": ["2"]})


def judges_nothing(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return [None for _ in completions]


def a_word(solution_str: str, ground_truth: str) -> Any:
    return "good"


def asks_too_long(prompts: list[str], responses: list[str]) -> list[float]:
    raise TimeoutError("the judge is away")


def sleeps(prompts: list[str], responses: list[str]) -> list[float]:
    time.sleep(0.3)
    return [0.0]


def sets_an_alarm(prompts: list[str], responses: list[str]) -> list[float]:
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    return [0.0]


def tried(path: str, timeout_s: float = 60.0) -> list[int]:
    return list(try_functions([Trial({"reward_service.scorer": path}, REQUEST)], timeout_s=timeout_s))


def refused(path: str, timeout_s: float = 60.0) -> tuple[str, str]:
    with pytest.raises(InputError) as caught:
        tried(path, timeout_s)
    return caught.value.where, caught.value.what


@pytest.mark.parametrize("name", ["length", "length_async", "equals_reference"])
def test_scorer_that_returns_a_number_passes(name: str) -> None:
    assert tried(f"tests.support.scorers:{name}") == [1]


def test_scorer_that_does_not_apply_to_the_first_prompt_passes() -> None:
    assert tried(f"{__name__}:judges_nothing") == [1]


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
    assert what.startswith("returned str 'good' for trial, not a number: compute_score(data_source, solution_str")


def test_slow_function_is_distinguished_from_one_raising_TimeoutError() -> None:
    assert "sleeps did not return within 0.1 s" in refused(f"{__name__}:sleeps", 0.1)[1]
    assert "raised TimeoutError: the judge is away" in refused(f"{__name__}:asks_too_long")[1]


def test_missing_function_is_named_by_its_setting() -> None:
    assert refused("tests.support.scorers:nobody")[0] == "reward_service.scorer"


def test_error_says_what_to_do_if_a_function_needs_the_main_thread() -> None:
    _, what = refused(f"{__name__}:sets_an_alarm")
    assert "reward functions run outside the main thread" in what
    assert "parsing_timeout=None" in what
