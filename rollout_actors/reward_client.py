"""Define the interface of the reward client that rollout actors use; `reward_service.client` implements it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cluster.errors import RewardError
from cluster.scoring import Score, ScoreRequest


class RewardClient(Protocol):
    """Scores responses."""

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Score | RewardError]:
        """Return the score or the error of each request, in the order of the requests.

        Raises RewardUnavailable if the wait for the service times out, RewardError if it refuses the whole call.
        """

    def waiting(self) -> str | None:
        """Return which rewards are overdue and why, or None."""
