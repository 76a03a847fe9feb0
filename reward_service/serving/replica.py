"""One replica of the reward service: its scorers by name and version.

Imports neither Ray nor an HTTP library.
"""

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
"""A call counts as hung after this many times its deadline."""


@dataclass(slots=True, eq=False)
class Generation:
    """Scorers that were built together, their reward models, and the number of their running calls."""

    scorers: Mapping[str, Scorer]
    models: Models | None = None
    num_calls: int = 0


class RewardService:
    """Scores requests with the requested scorer, and counts the items that got a reward.

    A call uses one scorer from start to end; a version that is loaded meanwhile is used by later calls.
    """

    def __init__(self, config: RewardServiceConfig) -> None:
        self._config = config
        self._generations: list[Generation] = []  # the current scorers, then the previous ones
        self._retired: list[Generation] = []
        self._num_scored = 0
        self._since: dict[object, float] = {}

    async def check_health(self) -> None:
        """Raise RewardError if a call has run far beyond its deadline; Ray Serve restarts it.

        Its scorer hangs and would block all later calls.
        """
        oldest_s = time.monotonic() - min(self._since.values(), default=time.monotonic())
        if oldest_s > HUNG_AFTER * self._config.timeout_s:
            raise RewardError("reward_service", f"a call has been running for {oldest_s:.0f} s: its scorer hangs")

    async def load(self, versions: ModelVersions) -> None:
        """Build the scorers of these reward models; the current scorers serve until all are built.

        Scorers that exist already are reused. Raises InputError for a folder that is not a model, or whose weights
        differ from the published ones; the current scorers stay then.
        """
        wanted = [versions.present] if versions.present == versions.previous else list(versions)
        existing = [next((each for each in self._generations if each.models == models), None) for models in wanted]
        fresh: list[Generation] = []
        try:
            for models in (models for models, generation in zip(wanted, existing, strict=True) if generation is None):
                fresh.append(Generation(await asyncio.to_thread(_build, self._config, models), models))
                _check_digests(fresh[-1].scorers, models)
        except BaseException:
            await _close(fresh)
            raise
        self._serve([generation or fresh.pop(0) for generation in existing])
        await self._close_retired()

    def take(self, scorers: Mapping[str, Scorer]) -> None:
        """Serve these scorers; only the ones they replace can still be requested by version."""
        self._serve([Generation(dict(scorers)), *self._generations[:1]])

    def _serve(self, generations: list[Generation]) -> None:
        """Serve the first generation, and the second for calls that request its versions."""
        self._retired += [generation for generation in self._generations if generation not in generations]
        self._generations = generations

    async def outcomes(self, requests: Sequence[ScoreRequest], scorer: str | None = None) -> list[Outcome]:
        """Return one outcome per request, in order: its score, or a RewardError.

        `scorer` is a name or a version; None means the default. Raises UnknownScorer.
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
        """Return the scorers, the default first."""
        infos = []
        for name, scorer in self._current():
            versions = tuple(dict.fromkeys(g.scorers[name].version for g in self._generations if name in g.scorers))
            infos.append(ScorerInfo(name, scorer.version, versions, is_default=name == self._config.scorer))
        return infos

    async def num_scored(self) -> int:
        """Return how many items got a reward since this replica started."""
        return self._num_scored

    def _current(self) -> list[tuple[str, Scorer]]:
        scorers, default = self._generations[0].scorers, self._config.scorer
        return [(name, scorers[name]) for name in sorted(scorers, key=lambda name: (name != default, name))]

    def _find(self, wanted: str | None) -> tuple[Generation, Scorer]:
        for generation, name, scorer in self._all():
            if wanted in (None, name, scorer.version):
                return generation, scorer
        names = ", ".join(name for name, _ in self._current())
        raise UnknownScorer("scorer", f"no scorer {wanted!r}; this service has {names}")

    def _all(self) -> Iterator[tuple[Generation, str, Scorer]]:
        """Yield the current scorers, the default first, then the previous ones."""
        for name, scorer in self._current():
            yield self._generations[0], name, scorer
        for generation in self._generations[1:]:
            for name, scorer in generation.scorers.items():
                yield generation, name, scorer

    async def _close_retired(self) -> None:
        ended = [generation for generation in self._retired if not generation.num_calls]
        self._retired = [generation for generation in self._retired if generation.num_calls]
        await _close(ended)


def _build(config: RewardServiceConfig, models: Models) -> dict[str, Scorer]:
    """Build the scorers of the settings, with these folders for the reward models."""
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
            what = f"{model.folder} contains {scorers[name].version}, but {name}@{model.digest} was published"
            raise InputError(name, what)


async def _close(generations: Sequence[Generation]) -> None:
    for scorer in dict.fromkeys(scorer for generation in generations for scorer in generation.scorers.values()):
        await close(scorer)
