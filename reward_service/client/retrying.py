"""Retry until every reward is available."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Sequence
from typing import Any

from cluster.errors import RewardUnavailable
from cluster.scoring import Outcome, Score, ScoreRequest
from reward_service.client.outcomes import LONGEST_PAUSE_S, PAUSE_S, WHERE, Client, all_scores


class RetryingRewardClient:
    """Asks a client again while its service is unavailable, for at most `patience_s` since its last answer to anybody.

    Nothing else is waited for meanwhile, so a run pauses; `waiting` says for what. Pauses between tries grow and are
    jittered, and are as long as the service asks for, where that leaves one more try.
    """

    def __init__(self, client: Client, patience_s: float) -> None:
        self._client = client
        self._patience_s = patience_s
        self._missing: dict[int, str] = {}
        self._calls = 0
        self._answered_at = -math.inf

    def __reduce__(self) -> tuple[Any, ...]:
        return (RetryingRewardClient, (self._client, self._patience_s))

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """One score a request, in their order. Raises what `outcomes` raises, and the first error among them."""
        return all_scores(await self.outcomes(requests))

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """One outcome a request, in their order; none of them is RewardUnavailable: that is waited for.

        Raises the last RewardUnavailable when patience is spent.
        """
        self._calls += 1
        call, started, pause_s = self._calls, time.monotonic(), PAUSE_S
        try:
            while True:
                try:
                    outcomes = _all_available(await self._client.outcomes(requests))
                    self._answered_at = time.monotonic()
                    return outcomes
                except RewardUnavailable as error:
                    left_s = max(started, self._answered_at) + self._patience_s - time.monotonic()
                    wait_s = min(max(pause_s * random.uniform(0.5, 1.0), error.retry_after_s or 0.0), left_s)
                    if left_s <= 0:
                        raise self._spent(requests, error) from error
                    self._missing[call] = f"{len(requests)} rewards ({_named(requests)}): {error.what}"
                await asyncio.sleep(wait_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        finally:
            self._missing.pop(call, None)

    async def aclose(self) -> None:
        """Close the client's connections."""
        await self._client.aclose()

    def waiting(self) -> str | None:
        """What is missing, where something has been missing since the last try; None when all is well."""
        return next(iter(self._missing.values()), None)

    def _spent(self, requests: Sequence[ScoreRequest], error: RewardUnavailable) -> RewardUnavailable:
        what = f"no rewards for {_named(requests)} in {self._patience_s:g} s (reward_service.patience_s): {error.what}"
        return RewardUnavailable(WHERE, what)


def _all_available(outcomes: list[Outcome]) -> list[Outcome]:
    """The outcomes. Raises the first that may be another one later."""
    for outcome in outcomes:
        if isinstance(outcome, RewardUnavailable):
            raise outcome
    return outcomes


def _named(requests: Sequence[ScoreRequest]) -> str:
    ids = [request.id for request in requests]
    return ids[0] if len(ids) == 1 else f"{ids[0]} to {ids[-1]}"
