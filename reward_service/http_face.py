"""The HTTP face of the reward service: a FastAPI app around anything that scores. Knows no Ray and no scorer.

Tokens and limits act in front of it, in the guard.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, HTTPException, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBasic, HTTPBearer
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp

from cluster.errors import DeadlineExceeded, InputError, RewardError, RewardUnavailable
from cluster.scoring import Score, ScoreRequest
from reward_service import foreign_contracts as foreign
from reward_service.backend import Backend, ScorerInfo
from reward_service.config import HttpConfig
from reward_service.contracts import (
    ErrorResponse,
    Health,
    ItemReward,
    ModelCard,
    ModelList,
    RewardsRequest,
    RewardsResponse,
    parse_json,
)
from reward_service.guard import OPEN_PATH, RETRY_AFTER_S, Guard, error_answer
from reward_service.http_metrics import CONTENT_TYPE, HttpMetrics
from reward_service.scorer import Outcome
from reward_service.tokens import TokenBook

READY_TIMEOUT_S = 5.0
T = TypeVar("T")

DOCUMENTED = {
    400: "The request is not HTTP, its body not JSON, or it ended early.",
    401: "The token is missing, wrong or revoked.",
    405: "The route has no such method.",
    408: "The body was not sent in time.",
    413: "The body is too long.",
    415: "The body is compressed.",
    422: "The body is not what the contract says.",
    429: "Too many requests are under way; Retry-After says when to come again.",
    503: "Nobody can score now; Retry-After says when to come again.",
    504: "Scoring took longer than its deadline.",
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text} for status, text in DOCUMENTED.items()
}
SECURITY = [Security(HTTPBearer(auto_error=False)), Security(HTTPBasic(auto_error=False))]


class StrictRequest(Request):
    """A request whose JSON is read by `parse_json`."""

    async def json(self) -> Any:
        """The body's value; json.JSONDecodeError where it is none."""
        return parse_json(await self.body())


class StrictRoute(APIRoute):
    """A route that reads its body as `parse_json` does."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        """FastAPI's handler, with a strict request."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return strict


def build_app(
    backend: Backend,
    *,
    tokens: TokenBook,
    limits: HttpConfig,
    timeout_s: float,
    routers: Sequence[APIRouter] = (),
) -> ASGIApp:
    """The app behind its guard; `routers` bring further routes under the same tokens and limits."""
    metrics = HttpMetrics()
    app = FastAPI(title="Antiphon reward service", version="1", docs_url=None, redoc_url=None)
    calls = Calls(backend, metrics, timeout_s)
    for router in (_own_routes(calls, metrics), _foreign_routes(calls), *routers):
        app.include_router(router, dependencies=SECURITY, responses=REFUSALS)

    @app.get(OPEN_PATH, responses={400: REFUSALS[400], 405: REFUSALS[405], 429: REFUSALS[429]})
    async def healthz() -> Health:
        """Whether the process answers; needs no token."""
        return Health()

    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(StarletteHTTPException, _on_refusal)
    app.add_exception_handler(Exception, _on_failure)
    return Guard(app, tokens=tokens, limits=limits, metrics=metrics)


class Calls:
    """The backend as the routes call it: what it raises becomes an answer with a status."""

    def __init__(self, backend: Backend, metrics: HttpMetrics, timeout_s: float) -> None:
        self._backend = backend
        self._metrics = metrics
        self._timeout_s = timeout_s

    async def outcomes(
        self, items: Sequence[ScoreRequest], scorer: str | None = None, timeout_s: float | None = None
    ) -> list[Outcome]:
        """One outcome an item."""
        deadline_s = min(timeout_s or self._timeout_s, self._timeout_s)
        outcomes = await _answered(self._backend.score(items, scorer=scorer, timeout_s=deadline_s))
        num_scored = sum(isinstance(outcome, Score) for outcome in outcomes)
        self._metrics.scored(num_scored, len(outcomes) - num_scored)
        return outcomes

    async def scores(self, items: Sequence[ScoreRequest], scorer: str | None, field: str) -> list[Score]:
        """One score an item, for contracts that know no error of one item: the first is the call's, naming it."""
        scores = []
        for position, outcome in enumerate(await self.outcomes(items, scorer)):
            if isinstance(outcome, RewardError):
                raise refusal(422, str(outcome), f"{field}.{position}")
            scores.append(outcome)
        return scores

    async def models(self, timeout_s: float | None = None) -> list[ScorerInfo]:
        """The scorers, the default first."""
        return await _answered(self._backend.models(timeout_s=timeout_s or self._timeout_s))


async def _answered(call: Awaitable[T]) -> T:
    try:
        return await call
    except InputError as error:
        raise refusal(422, error.what, error.where) from None
    except DeadlineExceeded as error:
        raise refusal(504, error.what) from None
    except RewardUnavailable as error:
        wait = {"Retry-After": f"{max(1, round(error.retry_after_s or RETRY_AFTER_S))}"}
        raise HTTPException(503, {"message": error.what, "field": None}, wait) from None


def _own_routes(calls: Calls, metrics: HttpMetrics) -> APIRouter:
    router = APIRouter(route_class=StrictRoute)

    @router.post("/v1/rewards")
    async def rewards(body: RewardsRequest) -> RewardsResponse:
        """Score responses. An item that could not be scored has a null reward and its error."""
        items = body.items()
        outcomes = await calls.outcomes(items, body.scorer, body.timeout_s)
        versions = {outcome.scorer_version for outcome in outcomes if isinstance(outcome, Score)}
        version = versions.pop() if len(versions) == 1 else await _version(calls, body.scorer)
        answers = [_item(item, outcome) for item, outcome in zip(items, outcomes, strict=True)]
        return RewardsResponse(rewards=answers, model_version=version)

    @router.get("/v1/models")
    async def models() -> ModelList:
        """The scorers that can be asked for by name, the default first."""
        return ModelList(data=[_card(info) for info in await calls.models()])

    @router.get("/readyz")
    async def readyz() -> Health:
        """Whether somebody can score now."""
        await calls.models(READY_TIMEOUT_S)
        return Health()

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        """Counts for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    return router


async def _version(calls: Calls, scorer: str | None) -> str:
    """The version meant where no item tells it."""
    for info in await calls.models():
        if scorer is None or scorer in (info.name, *info.versions):
            return scorer if scorer in info.versions else info.version
    raise refusal(422, f"no scorer {scorer!r}", "scorer")


def _foreign_routes(calls: Calls) -> APIRouter:
    router = APIRouter(route_class=StrictRoute)

    @router.post("/get_reward")
    async def get_reward(body: foreign.GetRewardRequest) -> foreign.GetRewardResponse:
        """OpenRLHF's remote reward model."""
        scores = await calls.scores(body.items(), None, "query")
        rewards = [score.reward for score in scores]
        names = [name for name in (scores[0].parts if scores else {}) if all(name in s.parts for s in scores)]
        parts = {name: [score.parts[name] for score in scores] for name in names}
        return foreign.GetRewardResponse(rewards=rewards, scores=rewards, extra_logs=parts)

    @router.post("/classify")
    async def classify(body: foreign.ClassifyRequest) -> foreign.ClassifyResponse:
        """vLLM's classification of one label, as verl's reward loop reads it."""
        scores = await _pooled(calls, body)
        data = [foreign.ClassifyItem(index=i, probs=[body.shown(s.reward)]) for i, s in enumerate(scores)]
        return foreign.ClassifyResponse(id="classify", model=scores[0].scorer_version, data=data)

    @router.post("/pooling")
    async def pooling(body: foreign.ClassifyRequest) -> foreign.PoolingResponse:
        """vLLM's pooling of one label."""
        scores = await _pooled(calls, body)
        data = [foreign.PoolingItem(index=i, data=[body.shown(s.reward)]) for i, s in enumerate(scores)]
        return foreign.PoolingResponse(id="pooling", model=scores[0].scorer_version, data=data)

    return router


async def _pooled(calls: Calls, body: foreign.ClassifyRequest) -> list[Score]:
    known = {name for info in await calls.models() for name in (info.name, *info.versions)} if body.model else set()
    return await calls.scores(body.items(), body.model if body.model in known else None, "input")


def _item(request: ScoreRequest, outcome: Outcome) -> ItemReward:
    if isinstance(outcome, RewardError):
        return ItemReward(id=request.id, reward=None, error=str(outcome))
    return ItemReward(id=request.id, reward=outcome.reward, parts=dict(outcome.parts))


def _card(info: ScorerInfo) -> ModelCard:
    return ModelCard(id=info.name, version=info.version, versions=list(info.versions), default=info.is_default)


def refusal(status: int, message: str, field: str | None = None) -> HTTPException:
    """An error answer, to be raised by a route."""
    return HTTPException(status, {"message": message, "field": field})


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    detail: Any = error.detail
    headers = dict(error.headers) if error.headers else None
    if isinstance(detail, dict):
        return error_answer(error.status_code, detail["message"], detail.get("field"), headers)
    return error_answer(error.status_code, str(detail), None, headers)


async def _on_invalid(request: Request, error: Exception) -> Response:
    """The first thing wrong: 400 where the body is no JSON, 422 where it is not what the contract says."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return error_answer(400, f"the body is not JSON: {first['ctx']['error']}", None)
    field = ".".join(str(part) for part in first["loc"][1:]) or None
    return error_answer(422, first["msg"], field)


async def _on_failure(request: Request, error: Exception) -> Response:
    return error_answer(500, f"{type(error).__name__}; the service's log has the rest", None)
