"""Makes a FastAPI app with a guard: strict JSON, one error format, /healthz and /metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBasic, HTTPBearer
from starlette.types import ASGIApp

from reward_service.config.service import HttpConfig
from reward_service.http.errors import add_error_handlers, documented
from reward_service.http.guard import OPEN_PATH, Guard
from reward_service.http.metrics import CONTENT_TYPE, HttpMetrics
from reward_service.http.schemas import Health, parse_json
from reward_service.http.tokens import TokenBook

SECURITY = [Security(HTTPBearer(auto_error=False)), Security(HTTPBasic(auto_error=False))]


class StrictRequest(Request):
    """A request whose JSON body is parsed by `parse_json`."""

    async def body(self) -> bytes:
        """Return the body. A body in one piece, as the guard passes it on, is not copied."""
        if not hasattr(self, "_body"):
            pieces = [piece async for piece in self.stream() if piece]
            self._body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return self._body

    async def json(self) -> Any:
        """Return the parsed body. Raises json.JSONDecodeError."""
        return parse_json(await self.body())


class StrictRoute(APIRoute):
    """A route whose body is parsed by `parse_json`."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        """Return FastAPI's handler, called with a StrictRequest."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            try:
                return await handler(StrictRequest(request.scope, request.receive))
            except RequestValidationError as error:
                error.__context__ = None  # breaks a reference cycle that would keep the body in memory
                raise error.with_traceback(None) from None

        return strict


def guarded_app(
    title: str, routers: Sequence[APIRouter], *, tokens: TokenBook, limits: HttpConfig, metrics: HttpMetrics
) -> ASGIApp:
    """Return an app with the routes of `routers` behind one guard; only /healthz needs no token."""
    app = FastAPI(title=title, version="1", docs_url=None, redoc_url=None)
    for router in routers:
        app.include_router(router, dependencies=SECURITY)

    @app.get("/metrics", response_class=Response, dependencies=SECURITY, responses=_plain_text())
    async def prometheus() -> Response:
        """Metrics in Prometheus format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.get(OPEN_PATH, responses=documented())
    async def healthz() -> Health:
        """The process is alive. Needs no token."""
        return Health()

    add_error_handlers(app)
    return Guard(app, tokens=tokens, limits=limits, metrics=metrics)


def _plain_text() -> dict[int | str, dict[str, Any]]:
    return {200: {"content": {"text/plain": {}}}, **documented()}
