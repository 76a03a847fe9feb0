"""A FastAPI app behind its guard: strict JSON, one shape of errors, /healthz and /metrics. Knows no other route."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBasic, HTTPBearer
from starlette.types import ASGIApp

from reward_service.config.service import HttpConfig
from reward_service.http.errors import answer_problems, documented
from reward_service.http.guard import OPEN_PATH, Guard
from reward_service.http.metrics import CONTENT_TYPE, HttpMetrics
from reward_service.http.schemas import Health, parse_json
from reward_service.http.tokens import TokenBook

SECURITY = [Security(HTTPBearer(auto_error=False)), Security(HTTPBasic(auto_error=False))]


class StrictRequest(Request):
    """A request whose JSON is read by `parse_json`."""

    async def body(self) -> bytes:
        """The body; one that comes in one piece, as the guard gives it, is not copied."""
        if not hasattr(self, "_body"):
            pieces = [piece async for piece in self.stream() if piece]
            self._body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return self._body

    async def json(self) -> Any:
        """The body's value; json.JSONDecodeError where it is none."""
        return parse_json(await self.body())


class StrictRoute(APIRoute):
    """A route that reads its body as `parse_json` does."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        """FastAPI's handler, with a strict request."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            try:
                return await handler(StrictRequest(request.scope, request.receive))
            except RequestValidationError as error:
                error.__context__ = None  # FastAPI's frame holds the error and the body: a cycle, which the error ends
                raise error.with_traceback(None) from None

        return strict


def guarded_app(
    title: str, routers: Sequence[APIRouter], *, tokens: TokenBook, limits: HttpConfig, metrics: HttpMetrics
) -> ASGIApp:
    """The routes of these routers under one guard; /healthz alone needs no token."""
    app = FastAPI(title=title, version="1", docs_url=None, redoc_url=None)
    for router in routers:
        app.include_router(router, dependencies=SECURITY)

    @app.get("/metrics", response_class=Response, dependencies=SECURITY, responses=_plain_text())
    async def prometheus() -> Response:
        """Counts for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.get(OPEN_PATH, responses=documented())
    async def healthz() -> Health:
        """Whether the process answers; needs no token."""
        return Health()

    answer_problems(app)
    return Guard(app, tokens=tokens, limits=limits, metrics=metrics)


def _plain_text() -> dict[int | str, dict[str, Any]]:
    return {200: {"content": {"text/plain": {}}}, **documented()}
