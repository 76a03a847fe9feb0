"""What stands behind the HTTP face: anything that scores by a scorer's name. Knows no HTTP and no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.errors import InputError
from cluster.scoring import Outcome, ScoreRequest


class UnknownScorer(InputError):
    """A scorer was asked for that this service has not; `where` is `scorer`."""


@dataclass(frozen=True, slots=True)
class ScorerInfo:
    """A scorer that is served: its present version, and all versions that can be asked for, newest first."""

    name: str
    version: str
    versions: tuple[str, ...]
    is_default: bool


class Backend(Protocol):
    """Scores for the face. What it raises is for the whole call; what one item lacks is an outcome of that item."""

    async def score(self, requests: Sequence[ScoreRequest], *, scorer: str | None, timeout_s: float) -> list[Outcome]:
        """One outcome a request, in their order.

        Raises UnknownScorer and other InputErrors naming the request's field, DeadlineExceeded after `timeout_s`, and
        RewardUnavailable where nobody can score now.
        """

    async def models(self, *, timeout_s: float) -> list[ScorerInfo]:
        """The scorers, the default first. Raises as `score` does."""
