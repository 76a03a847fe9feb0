"""Check what a reward service answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from cluster.errors import RewardError, RewardUnavailable
from cluster.scoring import Outcome, Score, ScoreRequest

WHERE = "reward_service"


PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0


class Client(Protocol):
    """Scores, or raises as the module says."""

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """One outcome a request, in their order."""

    async def aclose(self) -> None:
        """Close its connections; it may be used again."""


def all_scores(outcomes: Sequence[Outcome]) -> list[Score]:
    """The outcomes, all of them scores. Raises the first error among them."""
    scores = []
    for outcome in outcomes:
        if isinstance(outcome, RewardError):
            raise outcome
        scores.append(outcome)
    return scores


def check_outcomes(requests: Sequence[ScoreRequest], scores: Any) -> list[Outcome]:
    """The outcomes, or RewardUnavailable where they are not one finite score, or error, a request under its own id."""
    if not isinstance(scores, list) or not all(isinstance(score, Score | RewardError) for score in scores):
        raise RewardUnavailable(WHERE, f"answered {type(scores).__name__}, not a list of scores")
    if len(scores) != len(requests):
        raise RewardUnavailable(WHERE, f"answered {len(scores)} scores for {len(requests)} responses")
    for request, score in zip(requests, scores, strict=True):
        if isinstance(score, RewardError):
            continue
        if score.id != request.id:
            raise RewardUnavailable(WHERE, f"answered a score for {score.id} where {request.id} was asked")
        if isinstance(score.reward, bool) or not isinstance(score.reward, int | float):
            raise RewardUnavailable(WHERE, f"answered {score.reward!r} for {score.id}, not a number")
        if not _is_finite(score.reward):
            raise RewardUnavailable(WHERE, f"answered {score.reward} for {score.id}, not a finite number")
        if not isinstance(score.parts, dict) or not all(map(_is_finite, score.parts.values())):
            raise RewardUnavailable(WHERE, f"answered parts for {score.id} that are not finite numbers by name")
    return scores


def _is_finite(value: Any) -> bool:
    """Whether it is a number that a double holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
