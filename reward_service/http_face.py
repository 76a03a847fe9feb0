"""The HTTP face of the reward service: a FastAPI app around anything that scores. Knows no Ray and no scorer.

Token and body limit act in front of the app, before a body is read.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence
from typing import Any, Protocol

from fastapi import FastAPI, HTTPException, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import RewardError
from cluster.scoring import ScoreRequest
from reward_service.contracts import ErrorResponse, Health, ItemReward, Problem, RewardsRequest, RewardsResponse
from reward_service.scorer import Outcome

MAX_BODY_BYTES = 32 * 2**20
CODES = {
    400: "malformed",
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    422: "invalid",
    500: "internal",
    504: "deadline_exceeded",
}
OPEN_PATH = "/healthz"


class Judge(Protocol):
    """What the face needs of the service behind it."""

    scorer_name: str
    scorer_version: str

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """One outcome a request, in their order."""


def build_app(judge: Judge, *, token: str | None, timeout_s: float, max_body_bytes: int = MAX_BODY_BYTES) -> ASGIApp:
    """The app with its guard; with a token every route but /healthz wants it as a bearer."""
    app = FastAPI(title="Antiphon reward service", version="1", docs_url=None, redoc_url=None)
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse} for status in (400, 401, 404, 413, 422, 504)
    }
    bearer = Security(HTTPBearer(auto_error=False))

    @app.post("/v1/rewards", responses=refusals, dependencies=[bearer])
    async def rewards(body: RewardsRequest) -> RewardsResponse:
        """Score responses. An item that could not be scored has a null reward and its error."""
        if body.scorer not in (None, judge.scorer_name):
            raise _refusal(422, f"no scorer {body.scorer!r}; this service has {judge.scorer_name!r}", "scorer")
        items = body.items()
        try:
            outcomes = await asyncio.wait_for(judge.outcomes(items), timeout_s)
        except TimeoutError:
            raise _refusal(504, f"{judge.scorer_name} took longer than {timeout_s:g} s", None) from None
        answers = [_item(item, outcome) for item, outcome in zip(items, outcomes, strict=True)]
        return RewardsResponse(rewards=answers, model_version=judge.scorer_version)

    @app.get(OPEN_PATH)
    async def healthz() -> Health:
        """Whether the service answers; needs no token."""
        return Health()

    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(StarletteHTTPException, _on_refusal)
    app.add_exception_handler(Exception, _on_failure)
    return Guard(app, token=token, max_body_bytes=max_body_bytes)


def _item(request: ScoreRequest, outcome: Outcome) -> ItemReward:
    if isinstance(outcome, RewardError):
        return ItemReward(id=request.id, reward=None, error=str(outcome))
    return ItemReward(id=request.id, reward=outcome.reward, parts=dict(outcome.parts))


class Guard:
    """ASGI middleware that refuses a wrong token (401) and a body that is too long (413), reading no further."""

    def __init__(self, app: ASGIApp, *, token: str | None, max_body_bytes: int) -> None:
        self._app = app
        self._token = token.encode() if token else None
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        if scope["path"] != OPEN_PATH and not self._may_pass(headers.get(b"authorization", b"")):
            refusal = _answer(401, "a bearer token is required", None, {"WWW-Authenticate": "Bearer"})
            return await refusal(scope, receive, send)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            return await _answer(413, self._too_large(), None)(scope, receive, send)
        return await self._app(scope, self._counted(receive), send)

    def _may_pass(self, authorization: bytes) -> bool:
        if self._token is None:
            return True
        scheme, _, given = authorization.partition(b" ")
        return hmac.compare_digest(given.strip(), self._token) and scheme.lower() == b"bearer"

    def _counted(self, receive: Receive) -> Receive:
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise HTTPException(413, self._too_large())
            return message

        return counted

    def _too_large(self) -> str:
        return f"a body may have at most {self._max_body_bytes} bytes"


def _refusal(status: int, message: str, field: str | None) -> HTTPException:
    return HTTPException(status, {"message": message, "field": field})


def _answer(status: int, message: str, field: str | None, headers: dict[str, str] | None = None) -> JSONResponse:
    problem = Problem(code=CODES.get(status, "refused"), message=message, field=field)
    return JSONResponse(ErrorResponse(error=problem).model_dump(), status, headers)


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    detail: Any = error.detail
    headers = dict(error.headers) if error.headers else None
    if isinstance(detail, dict):
        return _answer(error.status_code, detail["message"], detail["field"], headers)
    return _answer(error.status_code, str(detail), None, headers)


async def _on_invalid(request: Request, error: Exception) -> Response:
    """The first thing wrong: 400 where the body is no JSON, 422 where it is not what the contract says."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return _answer(400, f"the body is not JSON: {first['ctx']['error']}", None)
    field = ".".join(str(part) for part in first["loc"][1:]) or None
    return _answer(422, first["msg"], field)


async def _on_failure(request: Request, error: Exception) -> Response:
    return _answer(500, f"{type(error).__name__}; the service's log has the rest", None)
