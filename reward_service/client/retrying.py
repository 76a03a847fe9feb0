"""The reward client of a run: retries while the service is unavailable."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Sequence
from typing import Any

from cluster.errors import BatchFailed, RewardUnavailable
from cluster.scoring import Outcome, Score, ScoreRequest
from reward_service.client.outcomes import LONGEST_PAUSE_S, PAUSE_S, WHERE, RewardTransport, all_scores


class RetryingRewardClient:
    """Retries calls while the service is unavailable, at most `patience_s` after its last answer.

    The run pauses meanwhile; `waiting` returns what it waits for. Pauses between retries grow, with jitter, and are at
    least as long as the service asks for, but the last retry is always made before patience ends.
    """

    def __init__(self, transport: RewardTransport, patience_s: float) -> None:
        self._transport = transport
        self._patience_s = patience_s
        self._missing: dict[int, str] = {}
        self._calls = 0
        self._answered_at = -math.inf

    def __reduce__(self) -> tuple[Any, ...]:
        return (RetryingRewardClient, (self._transport, self._patience_s))

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """Return one score per request, in order.

        Requests on which the scorer failed together are scored one by one. Raises as `outcomes` does, and the first
        error among the outcomes.
        """
        outcomes = await self.outcomes(requests)
        scores: list[Score] = []
        for request, outcome in zip(requests, outcomes, strict=True):
            alone = isinstance(outcome, BatchFailed) and len(requests) > 1
            scores += all_scores(await self.outcomes([request]) if alone else [outcome])
        return scores

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """Return one outcome per request, in order; none is RewardUnavailable, because those are retried.

        Raises the last RewardUnavailable when patience ends.
        """
        self._calls += 1
        call, started, pause_s = self._calls, time.monotonic(), PAUSE_S
        try:
            while True:
                try:
                    outcomes = _all_available(await self._transport.outcomes(requests))
                    self._answered_at = time.monotonic()
                    return outcomes
                except RewardUnavailable as error:
                    left_s = max(started, self._answered_at) + self._patience_s - time.monotonic()
                    wait_s = min(max(pause_s * random.uniform(0.5, 1.0), error.retry_after_s or 0.0), left_s)
                    if left_s <= 0:
                        raise self._out_of_patience(requests, error) from error
                    self._missing[call] = f"{len(requests)} rewards ({_id_range(requests)}): {error.what}"
                await asyncio.sleep(wait_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        finally:
            self._missing.pop(call, None)

    async def aclose(self) -> None:
        """Close the transport's connections."""
        await self._transport.aclose()

    def waiting(self) -> str | None:
        """Return which rewards are missing since the last attempt and why, or None if none are."""
        return next(iter(self._missing.values()), None)

    def _out_of_patience(self, requests: Sequence[ScoreRequest], error: RewardUnavailable) -> RewardUnavailable:
        ids, limit = _id_range(requests), f"{self._patience_s:g} s (reward_service.patience_s)"
        return RewardUnavailable(WHERE, f"no rewards for {ids} in {limit}: {error.what}")


def _all_available(outcomes: list[Outcome]) -> list[Outcome]:
    """Return the outcomes. Raises the first RewardUnavailable among them."""
    for outcome in outcomes:
        if isinstance(outcome, RewardUnavailable):
            raise outcome
    return outcomes


def _id_range(requests: Sequence[ScoreRequest]) -> str:
    if not requests:
        return "no items"
    ids = [request.id for request in requests]
    return ids[0] if len(ids) == 1 else f"{ids[0]} to {ids[-1]}"
