"""The kind `composite`: a weighted sum of normalized rewards, with vetoes by gates.

The scorers run concurrently, each once per call. A composite keeps no state, so the same input always has the same
reward.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.errors import BatchFailed, NotApplicable, RewardError, RewardUnavailable
from cluster.scoring import Outcome, Score, ScoreRequest
from reward_service.config.composite import CompositeConfig, Statistics
from reward_service.config.scorers import settings_text
from reward_service.scorers.files import read_statistics
from reward_service.scorers.scorer import Builder, Kind, Scorer, digest_of, register_kind


class CompositeScorer:
    """Returns the weighted sum of rewards; its parts are the scorers' unweighted rewards and parts.

    If a scorer fails on an item, the outcome is an error that names the scorer. A scorer that does not apply to an
    item is left out of its sum; if none applies, the composite does not apply either.
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
        fixed = [f"{member} {value.mean!r} {value.std!r}" for member, value in sorted(statistics.items())]
        versions = [f"{member} {scorer.version}" for member, scorer in self._scorers.items()]
        self.version = f"{name}@{digest_of(settings_text(config), *fixed, *versions)}"

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """Return one outcome per request, in order."""
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
                error = next(
                    (kind for kind in (RewardUnavailable, BatchFailed) if isinstance(outcome, kind)), RewardError
                )
                return error(self.name, f"its part {member}: {outcome.what}")
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
        """Return the weighted sum, or the reward of a vetoed response if a gate is at or below its threshold."""
        rewards = {gate: scores[gate].reward for gate in self._config.gates if gate in scores}
        vetoes = [reward for gate, reward in rewards.items() if reward <= self._config.thresholds.get(gate, 0.0)]
        if not vetoes:
            return weighted_sum
        return min(weighted_sum, *vetoes) if self._config.vetoed is None else self._config.vetoed


def _parts(scores: Mapping[str, Score]) -> dict[str, float]:
    """Return each scorer's reward under its name, and its parts as `name/part`."""
    parts = {}
    for member, score in scores.items():
        parts[member] = score.reward
        parts.update({f"{member}/{name}": value for name, value in score.parts.items() if name != member})
    return parts


def _build(name: str, config: CompositeConfig, builder: Builder) -> Scorer:
    scorers = {member: builder.scorer(member) for member in config.members()}
    statistics = {
        member: value if isinstance(value, Statistics) else read_statistics(builder.reward_model_folder(member))
        for member, value in config.normalize.items()
    }
    return CompositeScorer(name, config, scorers, statistics)


def _check_files(name: str, config: CompositeConfig, folders: Mapping[str, Path]) -> None:
    for member, statistics in config.normalize.items():
        if statistics == "reward_statistics" and member in folders:
            read_statistics(folders[member])


register_kind(CompositeConfig, Kind(_build, _check_files))
