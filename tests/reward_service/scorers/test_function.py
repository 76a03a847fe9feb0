from __future__ import annotations

import asyncio

import pytest

from cluster.errors import RewardError
from cluster.scoring import Outcome, Score, ScoreRequest
from reward_service.scorers.function import FunctionScorer, load_function


def scorer(name: str) -> FunctionScorer:
    path = f"tests.support.scorers:{name}"
    return FunctionScorer(path, load_function(path, "here"))


def requests(*responses: str) -> list[ScoreRequest]:
    return [ScoreRequest(f"7-0-{i}", "say", response) for i, response in enumerate(responses)]


def errors(outcomes: list[Outcome]) -> list[str | None]:
    return [str(outcome) if isinstance(outcome, RewardError) else None for outcome in outcomes]


@pytest.mark.parametrize("name", ["length", "length_async"])
async def test_a_function_scores_sync_or_async(name: str) -> None:
    outcomes = await scorer(name).score(requests("a", "bbb"))
    assert [outcome.reward for outcome in outcomes if isinstance(outcome, Score)] == [1.0, 3.0]
    assert [outcome.id for outcome in outcomes if isinstance(outcome, Score)] == ["7-0-0", "7-0-1"]


async def test_score_has_parts_and_the_version_of_the_source() -> None:
    (score,) = await scorer("length").score(requests("a"))
    assert isinstance(score, Score)
    assert dict(score.parts) == {"length": 1.0}
    assert score.scorer_version.startswith("tests.support.scorers:length@")
    assert len(score.scorer_version.rpartition("@")[2]) == 12


async def test_function_gets_only_the_columns_that_it_takes() -> None:
    items = [
        ScoreRequest("0", "p", "x", {"references": "x", "topic": "tea"}),
        ScoreRequest("1", "p", "x", {"references": "y"}),
    ]
    outcomes = await scorer("equals_reference").score(items)
    assert [outcome.reward for outcome in outcomes if isinstance(outcome, Score)] == [1.0, 0.0]


async def test_every_item_fails_if_the_function_raises() -> None:
    outcomes = await scorer("raising").score(requests("a", "b"))
    expected = "tests.support.scorers:raising: raised KeyError: 'no such answer' (scoring 2 items, 7-0-0 to 7-0-1)"
    assert errors(outcomes) == [expected] * 2


async def test_every_item_fails_if_there_are_too_few_rewards() -> None:
    outcomes = await scorer("too_few").score(requests("a", "b"))
    expected = "tests.support.scorers:too_few: returned 1 rewards for 2 responses (scoring 2 items, 7-0-0 to 7-0-1)"
    assert errors(outcomes) == [expected] * 2


async def test_error_names_the_item_if_the_value_is_not_a_list() -> None:
    outcomes = await scorer("not_a_list").score(requests("a"))
    assert errors(outcomes) == ["tests.support.scorers:not_a_list: returned float, not a list (scoring 7-0-0)"]


@pytest.mark.parametrize("wrong", ["nan", "inf", "huge", "string", "none"])
async def test_value_that_is_not_finite_fails_only_its_item(wrong: str) -> None:
    good, bad = await scorer("wrong_on_demand").score(requests("one", wrong))
    assert isinstance(good, Score)
    assert good.reward == 1.0
    assert isinstance(bad, RewardError)
    assert bad.where == "tests.support.scorers:wrong_on_demand"
    assert "7-0-1" in bad.what


async def test_function_is_not_called_without_requests() -> None:
    assert await scorer("raising").score([]) == []


async def test_slow_sync_function_does_not_block_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    release = threading.Event()
    monkeypatch.setattr("tests.support.scorers.time.sleep", lambda seconds: release.wait(10))
    call = asyncio.create_task(scorer("slow").score(requests("a")))
    await asyncio.sleep(0)
    release.set()
    (outcome,) = await call
    assert isinstance(outcome, Score)
