"""One copy of the reward service: its scorers by name, and new versions of them. Knows no Ray and no HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import InputError, RewardError
from cluster.scoring import Outcome, Score, ScoreRequest
from reward_service.backend import ScorerInfo, UnknownScorer
from reward_service.config.service import REWARD_MODEL, RewardServiceConfig
from reward_service.scorers.files import require_reward_model
from reward_service.scorers.registry import build_scorers
from reward_service.scorers.scorer import Scorer, close
from reward_service.serving.versions import Models, ModelVersions

HUNG_AFTER = 3
"""Deadlines after which a call counts as hung."""


@dataclass(slots=True, eq=False)
class Generation:
    """Scorers that were built together, the models they were built of, and how many calls they have."""

    scorers: Mapping[str, Scorer]
    models: Models | None = None
    num_calls: int = 0


class RewardService:
    """Scores requests with the scorer they name, and counts the items that got a reward.

    A call has one scorer from its start to its end: a version that comes meanwhile is for the calls after it.
    """

    def __init__(self, config: RewardServiceConfig) -> None:
        self._config = config
        self._generations: list[Generation] = []  # the present scorers, and those before
        self._retired: list[Generation] = []
        self._num_scored = 0
        self._since: dict[object, float] = {}

    async def check_health(self) -> None:
        """Raise RewardError where a call has been under way far beyond its deadline: its scorer hangs, and with it all
        that comes after. Ray Serve starts such a replica again."""
        oldest_s = time.monotonic() - min(self._since.values(), default=time.monotonic())
        if oldest_s > HUNG_AFTER * self._config.timeout_s:
            raise RewardError("reward_service", f"a call has been under way for {oldest_s:.0f} s: its scorer hangs")

    async def load(self, versions: ModelVersions) -> None:
        """Build the scorers of these reward models; those that serve now do so until all are whole.

        What is built already is not built again. Raises InputError for a folder that is no model or not the one that
        was published; the present scorers stay then.
        """
        wanted = [versions.present] if versions.present == versions.previous else list(versions)
        known = [next((each for each in self._generations if each.models == models), None) for models in wanted]
        fresh: list[Generation] = []
        try:
            for models in (models for models, generation in zip(wanted, known, strict=True) if generation is None):
                fresh.append(Generation(await asyncio.to_thread(_build, self._config, models), models))
                _check_digests(fresh[-1].scorers, models)
        except BaseException:
            await _close(fresh)
            raise
        self._serve([generation or fresh.pop(0) for generation in known])
        await self._close_retired()

    def take(self, scorers: Mapping[str, Scorer]) -> None:
        """Serve these from now on; the present ones can still be asked for by their versions, older ones no more."""
        self._serve([Generation(dict(scorers)), *self._generations[:1]])

    def _serve(self, generations: list[Generation]) -> None:
        """Serve the first of these, and the second to those who ask for its versions."""
        self._retired += [generation for generation in self._generations if generation not in generations]
        self._generations = generations

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
        await _close(ended)


def _build(config: RewardServiceConfig, models: Models) -> dict[str, Scorer]:
    """The scorers of the settings, with these folders for the reward models."""
    folders = {name: Path(model.folder) for name, model in models.items()}
    for name, folder in folders.items():
        require_reward_model(folder, name)
    scorers = {
        name: scorer.model_copy(update={"path": folders[name]}) if name in folders else scorer
        for name, scorer in config.scorers.items()
    }
    return build_scorers(config.model_copy(update={"scorers": scorers}), folders.get(REWARD_MODEL))


def _check_digests(scorers: Mapping[str, Scorer], models: Models) -> None:
    for name, model in models.items():
        if scorers[name].version != f"{name}@{model.digest}":
            what = f"{model.folder} holds {scorers[name].version}, and what was published is {name}@{model.digest}"
            raise InputError(name, what)


async def _close(generations: Sequence[Generation]) -> None:
    for scorer in dict.fromkeys(scorer for generation in generations for scorer in generation.scorers.values()):
        await close(scorer)
