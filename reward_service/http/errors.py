"""Answers every error in the format of `schemas.ErrorResponse`, and documents what each status means.

Routes decide which status an exception gets.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from reward_service.http.schemas import ErrorResponse, Problem

CODES = {
    400: "malformed",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "too_slow",
    409: "conflict",
    413: "too_large",
    415: "unsupported_media_type",
    422: "invalid",
    429: "too_many_requests",
    431: "too_large",
    500: "internal",
    503: "unavailable",
    504: "deadline_exceeded",
}
MEANINGS = {
    400: "The request is not valid HTTP, its body is not JSON, or it ended early.",
    401: "The token is missing, wrong or revoked.",
    403: "If no token is set up, only requests to localhost are allowed.",
    404: "Nothing has that name.",
    405: "The route does not support the method.",
    408: "The body was not sent in time.",
    409: "The request contradicts stored data.",
    413: "The body is too long.",
    415: "The body is compressed.",
    422: "The request does not match the schema.",
    429: "Too many concurrent requests; retry after the seconds in Retry-After.",
    431: "The head of the request is too long.",
    503: "The service can't answer now; retry after the seconds in Retry-After.",
    504: "Scoring took longer than its deadline.",
}
ANY_ROUTE = (400, 401, 403, 405, 408, 413, 415, 429, 431, 503)
"""Statuses that the guard and the server may answer on any route."""


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI `responses` of a route: `statuses` and those of any route."""
    return {
        status: {"model": ErrorResponse, "description": MEANINGS[status]} for status in sorted({*ANY_ROUTE, *statuses})
    }


def refusal(
    status: int, message: str, field: str | None = None, *, retry_after_s: float | None = None
) -> HTTPException:
    """Return an error response that a route can raise."""
    headers = None if retry_after_s is None else {"Retry-After": str(max(1, round(retry_after_s)))}
    return HTTPException(status, {"message": message, "field": field}, headers)


def error_answer(status: int, message: str, field: str | None, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return an error response that can be sent."""
    problem = Problem(code=CODES.get(status, "refused"), message=message, field=field)
    return JSONResponse(ErrorResponse(error=problem).model_dump(), status, headers)


def add_error_handlers(app: FastAPI) -> None:
    """Add the error handlers to `app`; an HTTPException's detail is a text or {message, field}."""
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(StarletteHTTPException, _on_refusal)
    app.add_exception_handler(Exception, _on_failure)


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    detail: Any = error.detail
    headers = dict(error.headers) if error.headers else None
    if isinstance(detail, dict):
        return error_answer(error.status_code, detail["message"], detail["field"], headers)
    return error_answer(error.status_code, str(detail), None, headers)


async def _on_invalid(request: Request, error: Exception) -> Response:
    """Answer the first validation error: 400 for invalid JSON, 422 for a mismatch with the schema."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return error_answer(400, f"the body is not JSON: {first['ctx']['error']}", None)
    field = ".".join(str(part) for part in first["loc"][1:]) or None
    return error_answer(422, first["msg"], field)


async def _on_failure(request: Request, error: Exception) -> Response:
    return error_answer(500, f"{type(error).__name__}; see the service's log", None)
