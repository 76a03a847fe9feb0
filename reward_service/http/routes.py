"""The routes of the reward service. Imports neither Ray nor a scorer: a `Backend` scores."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Sequence
from typing import TypeVar

from fastapi import APIRouter
from starlette.types import ASGIApp

from cluster.errors import BatchFailed, DeadlineExceeded, InputError, RewardError, RewardUnavailable
from cluster.scoring import Outcome, Score, ScoreRequest
from reward_service.backend import Backend, ScorerInfo
from reward_service.config.service import HttpConfig
from reward_service.http import foreign_schemas as foreign
from reward_service.http.app import StrictRoute, guarded_app
from reward_service.http.errors import documented, refusal
from reward_service.http.guard import RETRY_AFTER_S
from reward_service.http.metrics import HttpMetrics
from reward_service.http.schemas import Health, ItemReward, ModelCard, ModelList, RewardsRequest, RewardsResponse
from reward_service.http.tokens import TokenBook

READY_TIMEOUT_S = 5.0
T = TypeVar("T")


def build_app(
    backend: Backend,
    *,
    tokens: TokenBook,
    limits: HttpConfig,
    timeout_s: float,
    routers: Sequence[APIRouter] = (),
) -> ASGIApp:
    """Return the app with its guard; `routers` add routes under the same tokens and limits."""
    metrics = HttpMetrics()
    calls = Calls(backend, metrics, timeout_s)
    routers = [_own_routes(calls), _foreign_routes(calls), *routers]
    return guarded_app("Antiphon reward service", routers, tokens=tokens, limits=limits, metrics=metrics)


class Deadline:
    """The deadline of one request, shared by all calls made for it."""

    def __init__(self, timeout_s: float) -> None:
        self._at = time.monotonic() + timeout_s

    def left_s(self) -> float:
        """Return the remaining seconds, at least 0."""
        return max(0.0, self._at - time.monotonic())


class Calls:
    """Calls the backend for the routes; turns its exceptions into responses with a status."""

    def __init__(self, backend: Backend, metrics: HttpMetrics, timeout_s: float) -> None:
        self._backend = backend
        self._metrics = metrics
        self._timeout_s = timeout_s

    def deadline(self, timeout_s: float | None = None) -> Deadline:
        """Return the deadline of a request that asks for `timeout_s`: at most the service's own timeout."""
        return Deadline(min(timeout_s or self._timeout_s, self._timeout_s))

    async def outcomes(self, items: Sequence[ScoreRequest], scorer: str | None, deadline: Deadline) -> list[Outcome]:
        """Return one outcome per item."""
        outcomes = await _answered(self._backend.score(items, scorer=scorer, timeout_s=deadline.left_s()))
        num_scored = sum(isinstance(outcome, Score) for outcome in outcomes)
        self._metrics.scored(num_scored, len(outcomes) - num_scored)
        return outcomes

    async def scores(
        self, items: Sequence[ScoreRequest], scorer: str | None, field: str, deadline: Deadline
    ) -> list[Score]:
        """Return one score per item.

        Raises the first item error, for APIs that can't report errors of single items.
        """
        scores = []
        for position, outcome in enumerate(await self.outcomes(items, scorer, deadline)):
            if isinstance(outcome, RewardUnavailable):
                raise refusal(503, str(outcome), f"{field}.{position}", retry_after_s=RETRY_AFTER_S)
            if isinstance(outcome, RewardError):
                raise refusal(422, str(outcome), f"{field}.{position}")
            scores.append(outcome)
        return scores

    async def models(self, deadline: Deadline) -> list[ScorerInfo]:
        """Return the scorers, the default first."""
        return await _answered(self._backend.models(timeout_s=deadline.left_s()))


async def _answered(call: Awaitable[T]) -> T:
    try:
        return await call
    except InputError as error:
        raise refusal(422, error.what, error.where) from None
    except DeadlineExceeded as error:
        raise refusal(504, error.what) from None
    except RewardUnavailable as error:
        raise refusal(503, error.what, retry_after_s=error.retry_after_s or RETRY_AFTER_S) from None


def _own_routes(calls: Calls) -> APIRouter:
    router = APIRouter(route_class=StrictRoute)

    @router.post("/v1/rewards", responses=documented(422, 504))
    async def rewards(body: RewardsRequest) -> RewardsResponse:
        """Score responses. An item that could not be scored has a null reward and its error."""
        items, deadline = body.items(), calls.deadline(body.timeout_s)
        outcomes = await calls.outcomes(items, body.scorer, deadline)
        versions = {outcome.scorer_version for outcome in outcomes if isinstance(outcome, Score)}
        version = versions.pop() if len(versions) == 1 else await _version(calls, body.scorer, deadline)
        answers = [_item(item, outcome) for item, outcome in zip(items, outcomes, strict=True)]
        return RewardsResponse(rewards=answers, model_version=version)

    @router.get("/v1/models", responses=documented(504))
    async def models() -> ModelList:
        """The scorers that can be requested by name, the default first."""
        return ModelList(data=[_card(info) for info in await calls.models(calls.deadline())])

    @router.get("/readyz", responses=documented(504))
    async def readyz() -> Health:
        """The service can score now."""
        await calls.models(calls.deadline(READY_TIMEOUT_S))
        return Health()

    return router


async def _version(calls: Calls, scorer: str | None, deadline: Deadline) -> str:
    """Return the version of the requested scorer, if no item has one or items have several."""
    for info in await calls.models(deadline):
        if scorer is None or scorer in (info.name, *info.versions):
            return scorer if scorer in info.versions else info.version
    raise refusal(422, f"no scorer {scorer!r}", "scorer")


def _foreign_routes(calls: Calls) -> APIRouter:
    router = APIRouter(route_class=StrictRoute)

    @router.post("/get_reward", responses=documented(422, 504))
    async def get_reward(body: foreign.GetRewardRequest) -> foreign.GetRewardResponse:
        """OpenRLHF's remote reward model."""
        scores = await calls.scores(body.items(), None, "query", calls.deadline())
        rewards = [score.reward for score in scores]
        names = [name for name in (scores[0].parts if scores else {}) if all(name in s.parts for s in scores)]
        parts = {name: [score.parts[name] for score in scores] for name in names}
        return foreign.GetRewardResponse(rewards=rewards, scores=rewards, extra_logs=parts)

    @router.post("/classify", responses=documented(422, 504))
    async def classify(body: foreign.ClassifyRequest) -> foreign.ClassifyResponse:
        """vLLM's classification of one label, as verl's reward loop reads it."""
        scores = await _scores_of_texts(calls, body)
        data = [foreign.ClassifyItem(index=i, probs=[body.activated(s.reward)]) for i, s in enumerate(scores)]
        return foreign.ClassifyResponse(id="classify", model=scores[0].scorer_version, data=data)

    @router.post("/pooling", responses=documented(422, 504))
    async def pooling(body: foreign.ClassifyRequest) -> foreign.PoolingResponse:
        """vLLM's pooling of one label."""
        scores = await _scores_of_texts(calls, body)
        data = [foreign.PoolingItem(index=i, data=[body.activated(s.reward)]) for i, s in enumerate(scores)]
        return foreign.PoolingResponse(id="pooling", model=scores[0].scorer_version, data=data)

    return router


async def _scores_of_texts(calls: Calls, body: foreign.ClassifyRequest) -> list[Score]:
    scorer, deadline = None, calls.deadline()
    if body.model:
        names = {name for info in await calls.models(deadline) for name in (info.name, *info.versions)}
        scorer = body.model if body.model in names else None
    return await calls.scores(body.items(), scorer, "input", deadline)


def _item(request: ScoreRequest, outcome: Outcome) -> ItemReward:
    if isinstance(outcome, RewardError):
        later, batch = isinstance(outcome, RewardUnavailable), isinstance(outcome, BatchFailed)
        return ItemReward(id=request.id, reward=None, error=str(outcome), unavailable=later, batch_failed=batch)
    return ItemReward(id=request.id, reward=outcome.reward, parts=dict(outcome.parts))


def _card(info: ScorerInfo) -> ModelCard:
    return ModelCard(id=info.name, version=info.version, versions=list(info.versions), default=info.is_default)
