"""A reward made of others: a weighted sum, normalised by frozen statistics, that gates may veto.

Asks its scorers side by side, each once whatever its roles. Knows only that they are scorers. Nothing here remembers
an item, so the same input always has the same answer.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence

from cluster.errors import NotApplicable, RewardError, RewardUnavailable
from cluster.scoring import Outcome, Score, ScoreRequest
from reward_service.config.composite import CompositeConfig, Statistics
from reward_service.config.scorers import settings_text
from reward_service.scorers.rules import VIOLATION
from reward_service.scorers.scorer import Scorer, digest_of


class CompositeScorer:
    """The weighted sum of `scorers`' rewards, whose parts are every scorer's own reward and parts, as they gave them.

    An item that one of them can't score is an error naming it; a part that does not apply to an item is left out of
    its sum, and where none applies the composite does not either.
    """

    def __init__(
        self,
        name: str,
        config: CompositeConfig,
        scorers: Mapping[str, Scorer],
        statistics: Mapping[str, Statistics],
    ) -> None:
        self.name = name
        self._config = config
        self._scorers = {member: scorers[member] for member in config.members()}
        self._statistics = statistics
        frozen = [f"{member} {value.mean!r} {value.std!r}" for member, value in sorted(statistics.items())]
        versions = [f"{member} {scorer.version}" for member, scorer in self._scorers.items()]
        self.version = f"{name}@{digest_of(settings_text(config), *frozen, *versions)}"

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        answers = await asyncio.gather(*(scorer.score(requests) for scorer in self._scorers.values()))
        columns = zip(*answers, strict=True)
        return [
            self._combined(request, dict(zip(self._scorers, outcomes, strict=True)))
            for request, outcomes in zip(requests, columns, strict=True)
        ]

    def _combined(self, request: ScoreRequest, outcomes: Mapping[str, Outcome]) -> Outcome:
        scores: dict[str, Score] = {}
        for member, outcome in outcomes.items():
            if isinstance(outcome, Score):
                scores[member] = outcome
            elif not isinstance(outcome, NotApplicable):
                kind = RewardUnavailable if isinstance(outcome, RewardUnavailable) else RewardError
                return kind(self.name, f"its part {member}: {outcome.what}")
        weighted = [self._weighted(member, scores[member].reward) for member in self._config.parts if member in scores]
        if not weighted:
            return NotApplicable(self.name, f"none of its parts applies to {request.id}")
        reward = self._after_gates(math.fsum(weighted), scores)
        if not math.isfinite(reward):
            return RewardError(self.name, f"the weighted sum of {request.id} is {reward}, not a finite number")
        return Score(request.id, reward, _parts(scores), self.version)

    def _weighted(self, member: str, reward: float) -> float:
        statistics = self._statistics.get(member)
        if statistics is not None:
            reward = (reward - statistics.mean) / statistics.std
        return self._config.parts[member] * reward

    def _after_gates(self, weighted_sum: float, scores: Mapping[str, Score]) -> float:
        """The weighted sum, or what a veto makes of it."""
        rewards = {gate: scores[gate].reward for gate in self._config.gates if gate in scores}
        vetoes = [reward for gate, reward in rewards.items() if reward <= self._config.thresholds.get(gate, 0.0)]
        if not vetoes:
            return weighted_sum
        return min(weighted_sum, *vetoes) if self._config.vetoed is None else self._config.vetoed


def _parts(scores: Mapping[str, Score]) -> dict[str, float]:
    """Each scorer's reward under its name, and what that is made of beneath it."""
    parts = {}
    for member, score in scores.items():
        parts[member] = score.reward
        parts.update({f"{member}/{name}": value for name, value in score.parts.items() if name != member})
    return parts


class GuardedScorer:
    """A rule that finds what is forbidden, and a function that may forbid more: 0 where either does."""

    def __init__(self, name: str, rule: Scorer, function: Scorer) -> None:
        self.name = name
        self.version = f"{name}@{digest_of(rule.version, function.version)}"
        self._rule = rule
        self._function = function

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        pairs = zip(*await asyncio.gather(self._rule.score(requests), self._function.score(requests)), strict=True)
        return [self._both(*pair) for pair in pairs]

    def _both(self, ruled: Outcome, called: Outcome) -> Outcome:
        if not isinstance(ruled, Score):
            return ruled
        if isinstance(called, NotApplicable):
            return Score(ruled.id, ruled.reward, ruled.parts, self.version)
        if not isinstance(called, Score):
            return RewardError(self.name, called.what)
        reward = float(ruled.reward > 0 and called.reward > 0)
        parts = {**ruled.parts, **called.parts, VIOLATION: 1 - reward, self.name: reward}
        return Score(ruled.id, reward, parts, self.version)

    def close(self) -> None:
        """Let both go."""
        for scorer in (self._rule, self._function):
            scorer.close()  # type: ignore[attr-defined]
