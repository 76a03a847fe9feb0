"""Weighted sums, gates and fixed statistics over fake scorers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import NotApplicable, RewardError
from cluster.scoring import Outcome, Score, ScoreRequest
from reward_service.config.composite import CompositeConfig, Statistics
from reward_service.scorers.composite import CompositeScorer
from reward_service.scorers.forbidden import GuardedScorer

ITEM = ScoreRequest("i", "p", "r")


class Fixed:
    """Returns one reward or one error for every item."""

    def __init__(self, name: str, answer: float | RewardError, version: str = "1", **parts: float) -> None:
        self.name = name
        self.version = f"{name}@{version}"
        self._answer = answer
        self._parts = parts
        self.calls = 0

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        self.calls += 1
        if isinstance(self._answer, RewardError):
            return [self._answer for _ in requests]
        return [Score(request.id, self._answer, self._parts, self.version) for request in requests]


def composite(scorers: dict[str, Any], parts: dict[str, float], **settings: Any) -> CompositeScorer:
    config = CompositeConfig(kind="composite", parts=parts, **settings)
    members = {name: given if hasattr(given, "score") else Fixed(name, given) for name, given in scorers.items()}
    statistics = {name: value for name, value in config.normalize.items() if isinstance(value, Statistics)}
    return CompositeScorer("all", config, members, statistics)


async def reward(scorer: CompositeScorer) -> float:
    (outcome,) = await scorer.score([ITEM])
    assert isinstance(outcome, Score), outcome
    return outcome.reward


async def test_a_composite_is_the_weighted_sum_of_its_parts() -> None:
    assert await reward(composite({"a": 2.0, "b": 3.0}, {"a": 0.5, "b": -1.0})) == -2.0


async def test_parts_are_the_reward_and_parts_of_every_scorer() -> None:
    inner = composite({"x": Fixed("x", 1.0, x=1.0, words=7.0)}, {"x": 2.0})
    outer = composite({"inner": inner, "a": Fixed("a", 3.0, a=3.0)}, {"inner": 1.0}, gates=("a",))
    (score,) = await outer.score([ITEM])
    assert isinstance(score, Score)
    assert score.reward == 2.0
    assert dict(score.parts) == {"inner": 2.0, "inner/x": 1.0, "inner/x/words": 7.0, "a": 3.0}


@pytest.mark.parametrize(
    ("safety", "settings", "expected"),
    [
        (0.0, {}, 0.0),
        (0.1, {}, 5.0),
        (-1.0, {}, -1.0),
        (0.0, {"vetoed": -3.0}, -3.0),
        (0.5, {"thresholds": {"safety": 0.5}}, 0.5),
        (0.6, {"thresholds": {"safety": 0.5}}, 5.0),
        (-0.5, {"thresholds": {"safety": -0.6}}, 5.0),
    ],
)
async def test_a_gate_vetoes_at_or_below_its_threshold(
    safety: float, settings: dict[str, Any], expected: float
) -> None:
    assert await reward(composite({"a": 5.0, "safety": safety}, {"a": 1.0}, gates=("safety",), **settings)) == expected


@settings(max_examples=30)
@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_veto_never_raises_a_reward(part: float, gate: float) -> None:
    scorers = {"a": part, "safety": gate}
    free = asyncio.run(reward(composite(scorers, {"a": 1.0})))
    assert asyncio.run(reward(composite(scorers, {"a": 1.0}, gates=("safety",)))) <= free


async def test_part_is_normalized_in_the_sum_but_reported_unchanged() -> None:
    normalize = {"a": Statistics(mean=1.0, std=2.0)}
    scorer = composite({"a": 5.0, "b": 1.0}, {"a": 3.0, "b": 1.0}, normalize=normalize)
    (score,) = await scorer.score([ITEM])
    assert isinstance(score, Score)
    assert (score.reward, score.parts["a"]) == (7.0, 5.0)


async def test_error_names_the_part_that_failed() -> None:
    cases: list[dict[str, float | RewardError]] = [
        {"a": 1.0, "b": RewardError("b", "i is too long")},
        {"a": RewardError("a", "x"), "b": 1.0},
    ]
    for scorers in cases:
        failed = next(name for name, given in scorers.items() if isinstance(given, RewardError))
        members = {name: Fixed(name, given) for name, given in scorers.items()}
        (outcome,) = await composite(members, {"a": 1.0}, gates=("b",)).score([ITEM])
        assert str(outcome).startswith(f"all: its part {failed}: ")


async def test_part_that_does_not_apply_is_left_out_of_the_sum() -> None:
    none = Fixed("b", NotApplicable("b", "does not apply to i"))
    scorer = composite({"a": 2.0, "b": none}, {"a": 1.0, "b": 5.0}, gates=("b",))
    (score,) = await scorer.score([ITEM])
    assert isinstance(score, Score)
    assert (score.reward, dict(score.parts)) == (2.0, {"a": 2.0})
    (outcome,) = await composite({"b": none}, {"b": 1.0}).score([ITEM])
    assert isinstance(outcome, NotApplicable)
    assert str(outcome) == "all: none of its parts applies to i"


async def test_error_if_the_sum_is_not_finite() -> None:
    (outcome,) = await composite({"a": 1e308}, {"a": 100.0}).score([ITEM])
    assert isinstance(outcome, RewardError)
    assert "not a finite number" in outcome.what


async def test_scorers_run_concurrently_and_once_per_call() -> None:
    started = asyncio.Barrier(2)

    class Meeting(Fixed):
        async def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
            await started.wait()
            return await super().score(requests)

    a, b = Meeting("a", 1.0), Meeting("b", 1.0)
    scorer = composite({"a": a, "b": b}, {"a": 1.0, "b": 1.0}, gates=("a",))
    assert await asyncio.wait_for(reward(scorer), 5) == 2.0
    assert (a.calls, b.calls) == (1, 1)


def test_version_depends_on_settings_statistics_and_parts() -> None:
    def version(weight: float = 1.0, mean: float = 0.0, part: str = "1") -> str:
        normalize = {"a": Statistics(mean=mean, std=1.0)}
        return composite({"a": Fixed("a", 1.0, part)}, {"a": weight}, normalize=normalize).version

    versions = [version(), version(weight=2.0), version(mean=1.0), version(part="2")]
    assert version() == versions[0]
    assert len(set(versions)) == 4


@settings(max_examples=30)
@given(st.dictionaries(st.sampled_from("abc"), st.floats(-1e3, 1e3), min_size=1), st.floats(-10, 10))
def test_the_sum_is_linear_in_its_weights(rewards: dict[str, float], factor: float) -> None:
    weights = {name: float(position + 1) for position, name in enumerate(rewards)}
    once = asyncio.run(reward(composite(rewards, weights)))
    scaled = asyncio.run(reward(composite(rewards, {name: factor * weight for name, weight in weights.items()})))
    assert math.isclose(scaled, factor * once, rel_tol=1e-9, abs_tol=1e-6)


@pytest.mark.parametrize(
    ("ruled", "called", "expected"),
    [(1.0, 1.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (1.0, -2.0, 0.0), (1.0, NotApplicable("f", "x"), 1.0)],
)
async def test_function_can_forbid_more_than_the_phrases(ruled: float, called: Any, expected: float) -> None:
    (score,) = await GuardedScorer("safety", Fixed("safety", ruled), Fixed("f", called)).score([ITEM])
    assert isinstance(score, Score)
    assert (score.reward, score.parts.get("violation", 1 - ruled)) == (expected, 1 - expected)


@pytest.mark.parametrize("broken", ["safety", "f"])
async def test_item_fails_if_the_rule_or_the_function_fails(broken: str) -> None:
    fixed = [Fixed(name, RewardError(name, "no") if name == broken else 1.0) for name in ("safety", "f")]
    (outcome,) = await GuardedScorer("safety", *fixed).score([ITEM])
    assert str(outcome) == "safety: no"
