"""The seam to whoever scores responses: owned here, where it is used; `reward_service.client` implements it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cluster.scoring import Score, ScoreRequest


class RewardClient(Protocol):
    """Scores responses; every request gets its score or the call raises RewardError."""

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """One score a request, in their order. Raises RewardError naming the scorer and the item that failed."""

    def waiting(self) -> str | None:
        """What is missing while a service that is down is waited for; None when all is well."""
