"""The seam to whoever scores responses: owned here, where it is used; `reward_service.client` implements it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cluster.errors import RewardError
from cluster.scoring import Score, ScoreRequest


class RewardClient(Protocol):
    """Scores responses; every request gets its score, or the error in its place."""

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Score | RewardError]:
        """One outcome a request, in their order: its score, or why there is none.

        Raises RewardUnavailable when the service is not waited for any longer, RewardError where it takes none of them.
        """

    def waiting(self) -> str | None:
        """What is missing while a service that is down is waited for; None when all is well."""
