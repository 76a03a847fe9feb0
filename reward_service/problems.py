"""Every failure of a FastAPI app in the one shape of `contracts.ErrorResponse`. Knows no route."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from reward_service.contracts import ErrorResponse, Problem

CODES = {
    400: "malformed",
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    413: "too_large",
    422: "invalid",
    500: "internal",
    503: "unavailable",
}


def answer_problems(app: FastAPI) -> None:
    """Give `app` the handlers; a refusal is an HTTPException whose detail is a text or {message, field}."""
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_refusal)
    app.add_exception_handler(Exception, _on_failure)


def _answer(status: int, message: str, field: str | None, headers: dict[str, str] | None = None) -> JSONResponse:
    problem = Problem(code=CODES.get(status, "refused"), message=message, field=field)
    return JSONResponse(ErrorResponse(error=problem).model_dump(), status, headers)


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
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
