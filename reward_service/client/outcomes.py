"""The transport interface of reward clients, and the checks of what a service answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import starmap
from typing import Any, Protocol

from cluster.data.unicode_text import is_unicode
from cluster.errors import RewardError, RewardUnavailable
from cluster.scoring import Outcome, Score, ScoreRequest

WHERE = "reward_service"
PAUSE_S = 0.2
"""Pause before the first retry; it doubles with each retry."""
LONGEST_PAUSE_S = 5.0


class RewardTransport(Protocol):
    """Sends requests to a reward service.

    Plain data until the first call, so it can be sent to another process.
    """

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """Return one outcome per request, in order: its score, or the RewardError of its scorer.

        Raises RewardUnavailable if the service is down, busy, silent or gives an invalid answer: a retry may succeed.
        Raises RewardError if it rejects the whole call.
        """

    async def aclose(self) -> None:
        """Close its connections; the next call opens them again."""


def all_scores(outcomes: Sequence[Outcome]) -> list[Score]:
    """Return the outcomes if all are scores. Raises the first error among them."""
    scores = []
    for outcome in outcomes:
        if isinstance(outcome, RewardError):
            raise outcome
        scores.append(outcome)
    return scores


def check_outcomes(requests: Sequence[ScoreRequest], scores: Any) -> list[Outcome]:
    """Return the outcomes if there is one error or finite score per request, with the request's id.

    Raises RewardUnavailable otherwise.
    """
    if not isinstance(scores, list) or not all(isinstance(score, Score | RewardError) for score in scores):
        raise RewardUnavailable(WHERE, f"answered {type(scores).__name__}, not a list of scores")
    if len(scores) != len(requests):
        raise RewardUnavailable(WHERE, f"answered {len(scores)} scores for {len(requests)} responses")
    for request, score in zip(requests, scores, strict=True):
        if isinstance(score, RewardError):
            continue
        if score.id != request.id:
            raise RewardUnavailable(WHERE, f"answered a score for {score.id} instead of {request.id}")
        if isinstance(score.reward, bool) or not isinstance(score.reward, int | float):
            raise RewardUnavailable(WHERE, f"answered {score.reward!r} for {score.id}, not a number")
        if not _is_finite(score.reward):
            raise RewardUnavailable(WHERE, f"answered {score.reward} for {score.id}, not a finite number")
        if not isinstance(score.parts, dict) or not all(starmap(_is_part, score.parts.items())):
            raise RewardUnavailable(WHERE, f"answered parts for {score.id} that are not finite numbers by name")
    return scores


def _is_part(name: Any, value: Any) -> bool:
    return isinstance(name, str) and is_unicode(name) and _is_finite(value)


def _is_finite(value: Any) -> bool:
    """Return whether the value is a number that fits a double."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
