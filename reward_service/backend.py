"""The interface between the HTTP server and the scorers. Imports neither an HTTP library nor Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.errors import InputError
from cluster.scoring import Outcome, ScoreRequest


class UnknownScorer(InputError):
    """The service has no scorer of the requested name or version; `where` is `scorer`."""


@dataclass(frozen=True, slots=True)
class ScorerInfo:
    """A served scorer: its current version, and all versions that can be requested, newest first."""

    name: str
    version: str
    versions: tuple[str, ...]
    is_default: bool


class Backend(Protocol):
    """Scores the requests of the HTTP server.

    Raises errors of the whole call; an error of one item is its outcome.
    """

    async def score(self, requests: Sequence[ScoreRequest], *, scorer: str | None, timeout_s: float) -> list[Outcome]:
        """Return one outcome per request, in order.

        Raises UnknownScorer and other InputErrors that name the request's field, DeadlineExceeded after `timeout_s`,
        and RewardUnavailable if no replica can score now.
        """

    async def models(self, *, timeout_s: float) -> list[ScorerInfo]:
        """Return the scorers, the default first. Raises as `score` does."""
