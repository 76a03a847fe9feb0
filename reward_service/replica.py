"""One copy of the reward service: its scorers by name, and new versions of them. Knows no Ray and no HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import RewardError
from cluster.scoring import Score, ScoreRequest
from reward_service.backend import ScorerInfo, UnknownScorer
from reward_service.config import REWARD_MODEL, RewardServiceConfig
from reward_service.registry import build_scorers
from reward_service.scorer import Outcome, Scorer, close

HUNG_AFTER = 3
"""Deadlines after which a call counts as hung."""
NUM_GENERATIONS = 2
"""The present scorers and those before, whose versions can still be asked for."""


@dataclass(slots=True, eq=False)
class Generation:
    """Scorers that were built together, and how many calls they have."""

    scorers: Mapping[str, Scorer]
    num_calls: int = 0


class RewardService:
    """Scores requests with the scorer they name, and counts the items that got a reward.

    A call has one scorer from its start to its end: a version that comes meanwhile is for the calls after it.
    """

    def __init__(self, config: RewardServiceConfig) -> None:
        self._config = config
        self._generations: list[Generation] = []
        self._retired: list[Generation] = []
        self._num_scored = 0
        self._since: dict[object, float] = {}

    async def check_health(self) -> None:
        """Raise RewardError where a call has been under way far beyond its deadline: its scorer hangs, and with it all
        that comes after. Ray Serve starts such a replica again."""
        oldest_s = time.monotonic() - min(self._since.values(), default=time.monotonic())
        if oldest_s > HUNG_AFTER * self._config.timeout_s:
            raise RewardError("reward_service", f"a call has been under way for {oldest_s:.0f} s: its scorer hangs")

    async def load(self, folders: Mapping[str, str]) -> None:
        """Build the scorers, reward models by name from these folders; the present ones serve until they are whole.

        Raises InputError for a folder that is no model; the present scorers stay then.
        """
        config = _with_folders(self._config, folders)
        own = Path(folders[REWARD_MODEL]) if REWARD_MODEL in folders else None
        self.take(await asyncio.to_thread(build_scorers, config, own))
        await self._close_retired()

    def take(self, scorers: Mapping[str, Scorer]) -> None:
        """Serve these from now on; the present ones can still be asked for by their versions, older ones no more."""
        generations = [Generation(dict(scorers)), *self._generations]
        self._generations, self._retired = generations[:NUM_GENERATIONS], self._retired + generations[NUM_GENERATIONS:]

    async def outcomes(self, requests: Sequence[ScoreRequest], scorer: str | None = None) -> list[Outcome]:
        """One outcome a request, in their order: its score, or the RewardError in its place.

        `scorer` is a name or a version, the default unless given. Raises UnknownScorer.
        """
        generation, found = self._find(scorer)
        call = object()
        generation.num_calls += 1
        self._since[call] = time.monotonic()
        try:
            outcomes = await found.score(requests)
        finally:
            del self._since[call]
            generation.num_calls -= 1
            await self._close_retired()
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
        infos = []
        for name, scorer in self._present():
            versions = tuple(dict.fromkeys(g.scorers[name].version for g in self._generations if name in g.scorers))
            infos.append(ScorerInfo(name, scorer.version, versions, is_default=name == self._config.scorer))
        return infos

    async def num_scored(self) -> int:
        """Items given a reward since this replica started."""
        return self._num_scored

    def _present(self) -> list[tuple[str, Scorer]]:
        scorers, default = self._generations[0].scorers, self._config.scorer
        return [(name, scorers[name]) for name in sorted(scorers, key=lambda name: (name != default, name))]

    def _find(self, wanted: str | None) -> tuple[Generation, Scorer]:
        for generation, name, scorer in self._all():
            if wanted in (None, name, scorer.version):
                return generation, scorer
        names = ", ".join(name for name, _ in self._present())
        raise UnknownScorer("scorer", f"no scorer {wanted!r}; this service has {names}")

    def _all(self) -> Iterator[tuple[Generation, str, Scorer]]:
        """The present scorers, the default first, then the older ones."""
        for name, scorer in self._present():
            yield self._generations[0], name, scorer
        for generation in self._generations[1:]:
            for name, scorer in generation.scorers.items():
                yield generation, name, scorer

    async def _close_retired(self) -> None:
        ended = [generation for generation in self._retired if not generation.num_calls]
        self._retired = [generation for generation in self._retired if generation.num_calls]
        for scorer in dict.fromkeys(scorer for generation in ended for scorer in generation.scorers.values()):
            await close(scorer)


def _with_folders(config: RewardServiceConfig, folders: Mapping[str, str]) -> RewardServiceConfig:
    """The settings with other folders for the named reward models."""
    named = {name: folder for name, folder in folders.items() if name != REWARD_MODEL}
    scorers = {
        name: scorer.model_copy(update={"path": Path(named[name])}) if name in named else scorer
        for name, scorer in config.scorers.items()
    }
    return config.model_copy(update={"scorers": scorers})
