"""The reward client that rollout actors use. `reward_service.client` implements it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cluster.errors import RewardError
from cluster.scoring import Score, ScoreRequest


class RewardClient(Protocol):
    """Scores responses."""

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Score | RewardError]:
        """Return one outcome for each request, in their order: its score, or the error of this request.

        Raises RewardUnavailable if the wait for the service has timed out, RewardError if it refuses all requests.
        """

    def waiting(self) -> str | None:
        """Return which rewards are overdue and why, or None."""
