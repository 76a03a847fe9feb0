"""One copy of the reward service: its scorers by name, and new versions of them. Knows no Ray and no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.errors import InputError, RewardError
from cluster.scoring import Score, ScoreRequest
from reward_service.config import REWARD_MODEL, RewardServiceConfig
from reward_service.backend import ScorerInfo, UnknownScorer
from reward_service.registry import build_scorers
from reward_service.scorer import Outcome, Scorer

NUM_OLDER = 1
"""Versions before the present one that can still be asked for."""


class RewardService:
    """Scores requests with the scorer they name, and counts the items that got a reward.

    A call has one scorer from its start to its end: a version that comes meanwhile is for the calls after it.
    """

    def __init__(self, config: RewardServiceConfig) -> None:
        self._config = config
        self._scorers: dict[str, Scorer] = {}
        self._older: dict[str, list[Scorer]] = {}
        self._num_scored = 0

    async def load(self, folders: Mapping[str, str]) -> None:
        """Build the scorers, reward models by name from these folders; the present ones serve until they are whole.

        Raises InputError for a folder that is no model; the present scorers stay then.
        """
        config = _with_folders(self._config, folders)
        own = Path(folders[REWARD_MODEL]) if REWARD_MODEL in folders else None
        self.take(await asyncio.to_thread(build_scorers, config, own))

    def take(self, scorers: Mapping[str, Scorer]) -> None:
        """Serve these from now on; a version that differs from the present one makes that an older one."""
        for name, scorer in scorers.items():
            present = self._scorers.get(name)
            if present is not None and present.version != scorer.version:
                older = [old for old in self._older.get(name, []) if old.version != scorer.version]
                self._older[name] = [present, *older][:NUM_OLDER]
        self._scorers = dict(scorers)

    async def outcomes(self, requests: Sequence[ScoreRequest], scorer: str | None = None) -> list[Outcome]:
        """One outcome a request, in their order: its score, or the RewardError in its place.

        `scorer` is a name or a version, the default unless given. Conversations in the column `messages` become
        prompts. Raises UnknownScorer, and InputError for conversations that no reward model here can read.
        """
        outcomes = await self._find(scorer).score(self._rendered(requests))
        self._num_scored += sum(isinstance(outcome, Score) for outcome in outcomes)
        return outcomes

    async def score(self, requests: Sequence[ScoreRequest], scorer: str | None = None) -> list[Score]:
        """One score a request, in their order. Raises the RewardError of the first item that has none."""
        scores = []
        for outcome in await self.outcomes(requests, scorer):
            if isinstance(outcome, RewardError):
                raise outcome
            scores.append(outcome)
        return scores

    async def models(self) -> list[ScorerInfo]:
        """The scorers, the default first."""
        default = self._config.scorer
        names = sorted(self._scorers, key=lambda name: (name != default, name))
        return [
            ScorerInfo(name, self._scorers[name].version, self._versions(name), is_default=name == default)
            for name in names
        ]

    async def num_scored(self) -> int:
        """Items given a reward since this replica started."""
        return self._num_scored

    def _rendered(self, requests: Sequence[ScoreRequest]) -> Sequence[ScoreRequest]:
        if not any("messages" in request.columns and not request.prompt for request in requests):
            return requests
        default = self._config.scorer
        for name in sorted(self._scorers, key=lambda name: (name != default, name)):
            render: Callable[[Any], str] | None = getattr(self._scorers[name], "render", None)
            if render is not None:
                return [
                    request if request.prompt else replace(request, prompt=render(request.columns.get("messages")))
                    for request in requests
                ]
        raise InputError("messages", "no reward model here has a chat template that could render them")

    def _versions(self, name: str) -> tuple[str, ...]:
        return tuple(scorer.version for scorer in (self._scorers[name], *self._older.get(name, [])))

    def _find(self, wanted: str | None) -> Scorer:
        if wanted is None:
            return self._scorers[self._config.scorer]
        if wanted in self._scorers:
            return self._scorers[wanted]
        for scorer in (*self._scorers.values(), *(old for older in self._older.values() for old in older)):
            if scorer.version == wanted:
                return scorer
        raise UnknownScorer("scorer", f"no scorer {wanted!r}; this service has {', '.join(sorted(self._scorers))}")


def _with_folders(config: RewardServiceConfig, folders: Mapping[str, str]) -> RewardServiceConfig:
    """The settings with other folders for the named reward models."""
    named = {name: folder for name, folder in folders.items() if name != REWARD_MODEL}
    scorers = {
        name: scorer.model_copy(update={"path": Path(named[name])}) if name in named else scorer
        for name, scorer in config.scorers.items()
    }
    return config.model_copy(update={"scorers": scorers})
