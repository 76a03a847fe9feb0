"""ASGI middleware that checks tokens and limits before a request is parsed.

A body is read completely, within its limits, before it is passed on. If a client disconnects before its response, the
work for it is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reward_service.config.service import HttpConfig
from reward_service.http.address import is_loopback
from reward_service.http.errors import error_answer
from reward_service.http.metrics import HttpMetrics
from reward_service.http.tokens import TokenBook

OPEN_PATH = "/healthz"
RETRY_AFTER_S = 1
LINGER_S = 0.5
"""Time to discard what a rejected client still sends, in seconds: an immediate close would lose the response."""
CHALLENGE = 'Bearer, Basic realm="antiphon", charset="UTF-8"'


class Refusal(Exception):
    """The request is rejected; if `closes`, its rest is not read and the connection is closed."""

    def __init__(self, status: int, message: str, *, closes: bool = False) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message
        self.closes = closes


class Guard:
    """Checks the token, the limits and the body of every request before the app gets it.

    Rejects, in this order: wrong token (401), unexpected Host header if no token is required (403), too many requests
    (429), Content-Encoding (415), body too large (413) or too slow (408), total size of pending bodies too large (503).
    /healthz is always answered and takes no body.
    """

    def __init__(self, app: ASGIApp, *, tokens: TokenBook, limits: HttpConfig, metrics: HttpMetrics) -> None:
        self._app = app
        self._tokens = tokens
        self._limits = limits
        self._metrics = metrics
        self._num_running = 0
        self._num_buffered_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started, status = time.monotonic(), 0

        async def record_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        num = int(scope["path"] != OPEN_PATH)
        self._num_running += num
        self._metrics.in_flight.set(self._num_running)
        try:
            await self._handle(scope, receive, record_status)
        finally:
            self._num_running -= num
            self._metrics.in_flight.set(self._num_running)
            self._metrics.answered(scope, status, time.monotonic() - started)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        num_bytes = 0
        try:
            self._check_head(scope)
            body = bytearray()
            if _has_body(scope):
                async for part in self._parts(receive):
                    num_bytes += len(part)
                    self._count_bytes(len(part))
                    body += part
            await _run_while_connected(self._app, scope, body, receive, send)
        except Refusal as refusal:
            answer = error_answer(refusal.status, refusal.message, None, _headers(refusal))
            await answer(scope, receive, self._lingering(receive, send) if refusal.closes else send)
        finally:
            self._num_buffered_bytes -= num_bytes

    def _check_head(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if scope["path"] == OPEN_PATH:
            if _has_body(scope):
                raise Refusal(413, f"{OPEN_PATH} takes no body", closes=True)
        else:
            name = self._tokens.name_of(headers.get(b"authorization", b""))
            scope.setdefault("state", {})["token_name"] = name
            if self._tokens.is_required and name is None:
                raise Refusal(401, "a token is required, as a bearer token or as a password", closes=_has_body(scope))
        if not self._tokens.is_required and not _is_for_loopback(headers.get(b"host", b"")):
            raise Refusal(403, "without a token, only requests to localhost are allowed", closes=_has_body(scope))
        if self._num_running > self._limits.max_waiting_requests:
            what = f"{self._limits.max_waiting_requests} requests are running; retry later"
            raise Refusal(429, what, closes=_has_body(scope))
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise Refusal(415, "the body must not be compressed (Content-Encoding)", closes=True)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limits.max_body_bytes:
            raise Refusal(413, self._too_large(), closes=True)

    async def _parts(self, receive: Receive) -> AsyncIterator[bytes]:
        """Yield the pieces of the body until its end. Raises Refusal at its limit or its deadline."""
        give_up_at = asyncio.get_running_loop().time() + self._limits.body_timeout_s
        num_bytes, more = 0, True
        while more:
            try:
                async with asyncio.timeout_at(give_up_at):
                    message = await receive()
            except TimeoutError:
                what = f"the body was not sent within {self._limits.body_timeout_s:g} s"
                raise Refusal(408, what, closes=True) from None
            if message["type"] == "http.disconnect":
                raise Refusal(400, "the body ended early", closes=True)
            part = message.get("body", b"")
            num_bytes += len(part)
            if num_bytes > self._limits.max_body_bytes:
                raise Refusal(413, self._too_large(), closes=True)
            yield part
            more = message.get("more_body", False)

    def _lingering(self, receive: Receive, send: Send) -> Send:
        """Return a `send` that discards what the client still sends before it completes the response.

        It discards at most the size of one body, for at most LINGER_S.
        """

        async def lingering(message: Message) -> None:
            is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send({**message, "more_body": True} if is_last else message)
            num_bytes, more = 0, is_last
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    while more and num_bytes <= self._limits.max_body_bytes:
                        rest = await receive()
                        num_bytes += len(rest.get("body", b""))
                        more = rest.get("more_body", False)
            if is_last:
                await send({"type": "http.response.body"})

        return lingering

    def _count_bytes(self, num_bytes: int) -> None:
        self._num_buffered_bytes += num_bytes
        if self._num_buffered_bytes > self._limits.max_buffered_bytes:
            raise Refusal(503, "too many bodies are being read; retry later", closes=True)

    def _too_large(self) -> str:
        return f"a body may have at most {self._limits.max_body_bytes} bytes"


def _is_for_loopback(host: bytes) -> bool:
    """Return whether a Host header names loopback. A web page that uses DNS rebinding sends its own name."""
    name = urlsplit(f"//{host.decode('latin-1')}").hostname
    return name is not None and is_loopback(name)


def _has_body(scope: Scope) -> bool:
    headers = dict(scope["headers"])
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"


def _headers(refusal: Refusal) -> dict[str, str]:
    headers = {"Connection": "close"} if refusal.closes else {}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = CHALLENGE
    if refusal.status in (429, 503):
        headers["Retry-After"] = str(RETRY_AFTER_S)
    return headers


async def _run_while_connected(app: ASGIApp, scope: Scope, body: bytearray, receive: Receive, send: Send) -> None:
    """Run the app on a complete body; cancel it if the client disconnects before the response."""
    is_body_read = is_answered = False
    disconnected = asyncio.ensure_future(_disconnected(receive))

    async def receive_body() -> Message:
        nonlocal is_body_read
        if is_body_read:
            return await asyncio.shield(disconnected)
        is_body_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def record_end(message: Message) -> None:
        nonlocal is_answered
        is_answered |= message["type"] == "http.response.body" and not message.get("more_body", False)
        await send(message)

    answering = asyncio.ensure_future(app(scope, receive_body, record_end))
    try:
        await asyncio.wait({answering, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if is_answered or not disconnected.done():
            await answering
    finally:
        disconnected.cancel()
        answering.cancel()
        await asyncio.wait({answering, disconnected})


async def _disconnected(receive: Receive) -> Message:
    """Wait until the client has disconnected, or its response is complete."""
    while (message := await receive())["type"] != "http.disconnect":
        pass
    return message
