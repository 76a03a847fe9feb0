"""Serves an ASGI app with uvicorn, and limits heads, connections and slow readers.

A client that is slow, sends without end, does not read or does not speak HTTP costs one connection and little memory.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cluster.errors import InputError
from reward_service.config.service import HttpConfig
from reward_service.http.schemas import ErrorResponse, Problem

MAX_HEAD_BYTES = 32 * 2**10
BACKLOG = 2048
EOF_GRACE_S = 2.0
"""Time to answer a client that has closed its sending side, in seconds; then it is treated as disconnected."""
RAW = {
    400: ("Bad Request", "malformed"),
    408: ("Request Timeout", "too_slow"),
    431: ("Request Header Fields Too Large", "too_large"),
    503: ("Service Unavailable", "unavailable"),
}
"""Reason and error code of responses that are sent before a request is complete."""


def listening_socket(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises InputError if the port is taken or the host is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # IPPROTO_TCP makes asyncio set TCP_NODELAY
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise InputError("reward_service.port", f"cannot listen on {host}:{port}: {error.strerror}") from error
    return bound


def http_server(app: ASGIApp, limits: HttpConfig, *, drain_timeout_s: float) -> uvicorn.Server:
    """Return a server of the app; `serve(sockets=[...])` runs it until `should_exit` is set.

    Raises InputError for an invalid certificate.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    config = uvicorn.Config(
        app,
        http=_protocol(limits),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=max(5, int(limits.header_timeout_s)),
        timeout_graceful_shutdown=max(1, round(drain_timeout_s)),
    )
    return uvicorn.Server(config)


def _protocol(limits: HttpConfig) -> type[HttpToolsProtocol]:
    class ConfiguredProtocol(LimitedProtocol):
        pass

    ConfiguredProtocol.limits = limits
    ConfiguredProtocol.tls = _tls(limits) if limits.ssl_certfile else None
    return ConfiguredProtocol


def _tls(limits: HttpConfig) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    assert limits.ssl_certfile is not None
    try:
        context.load_cert_chain(limits.ssl_certfile, limits.ssl_keyfile)
    except OSError as error:  # includes ssl.SSLError
        what = f"{limits.ssl_certfile} and its key cannot be used: {error}"
        raise InputError("reward_service.http.ssl_certfile", what) from error
    return context


class LimitedProtocol(HttpToolsProtocol):
    """One connection with one request at a time, and with limits of heads and unread responses.

    A connection counts from its first byte, and a TLS handshake has the deadline of a head. Headers after a body
    (trailers) are rejected: a proxy in front may not have checked them. A request that arrives before the previous
    response (pipelining) is not answered: the connection closes after that response.
    """

    limits: HttpConfig
    tls: ssl.SSLContext | None = None
    _timer: asyncio.TimerHandle | None = None
    _abort: asyncio.TimerHandle | None = None
    _num_head_bytes = 0
    _in_head = True
    _ignores_input = False
    _early: bytes | None = None  # bytes that arrive with the end of the TLS handshake

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        is_one_too_many = len(self.connections) > self.limits.max_connections
        if self.tls is not None and is_one_too_many:
            transport.abort()
        elif self.tls is not None:
            transport.pause_reading()
            self._early = b""
            handshake = self.loop.create_task(self._start_tls(transport, self.tls))
            self.tasks.add(handshake)
            handshake.add_done_callback(self.tasks.discard)
        elif is_one_too_many:
            self._refuse(503, f"{self.limits.max_connections} connections are open; retry later")
        else:
            self._expect_head()

    async def _start_tls(self, transport: Any, tls: ssl.SSLContext) -> None:
        """Continue over TLS; disconnect a client that does not complete the handshake in time."""
        timeout_s = self.limits.header_timeout_s
        timeouts = {"ssl_handshake_timeout": timeout_s, "ssl_shutdown_timeout": timeout_s}
        try:
            secure = await self.loop.start_tls(transport, self, tls, server_side=True, **timeouts)
        except OSError:  # includes ssl.SSLError and ConnectionError: the client can't receive an answer
            transport.abort()
            self.connections.discard(self)
            return
        if secure is None or secure.is_closing():
            return
        super().connection_made(secure)
        self._expect_head()
        early, self._early = self._early, None
        if early:
            self.data_received(early)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        self._cancel_abort()
        super().connection_lost(exc)

    def eof_received(self) -> bool:
        """Answer a client that closed its sending side, if the response starts within EOF_GRACE_S."""
        if not self._is_answering():
            return False
        self.cycle.keep_alive = False
        self.loop.call_later(EOF_GRACE_S, self._give_up, self.cycle)
        return True

    def _give_up(self, cycle: Any) -> None:
        if not cycle.response_started:
            self.transport.abort()

    def pause_writing(self) -> None:
        self._abort_later()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._cancel_abort()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if self._early is not None:
            self._early += data
            return
        if self.transport.is_closing() or self._ignores_input:
            return
        if self._in_head:
            self._num_head_bytes += len(data)
            if self._timer is None and not self._is_answering():
                self._expect_head()
        super().data_received(data)
        if self._in_head and self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431, f"the head of a request may have at most {MAX_HEAD_BYTES} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            super().on_header(name, value)
        else:
            self._refuse(400, "headers after the body are not allowed")

    def on_headers_complete(self) -> None:
        self._cancel_timer()
        self._in_head = False
        if self._ignores_input or self._is_answering():
            self._ignores_input = True
            self.cycle.keep_alive = False
            self.flow.pause_reading()
        elif not self.transport.is_closing():
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._ignores_input and not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._ignores_input and self.cycle is not None:
            super().on_message_complete()
        self._in_head, self._num_head_bytes = True, 0

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._num_head_bytes and not self.transport.is_closing():
            self._expect_head()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_head(self) -> None:
        what = f"the head of the request was not sent within {self.limits.header_timeout_s:g} s"
        self._timer = self.loop.call_later(self.limits.header_timeout_s, self._refuse, 408, what)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _abort_later(self) -> None:
        if self._abort is None:
            self._abort = self.loop.call_later(self.limits.write_timeout_s, self.transport.abort)

    def _cancel_abort(self) -> None:
        if self._abort is not None:
            self._abort.cancel()
            self._abort = None

    def _refuse(self, status: int, message: str) -> None:
        """Answer before the request is complete, and close; a response that has started is cut off."""
        self._cancel_timer()
        if self.transport.is_closing():
            return
        if not self._is_answering() or not self.cycle.response_started:
            self.transport.write(_raw_answer(status, message))
        self.transport.close()
        self._abort_later()


def _raw_answer(status: int, message: str) -> bytes:
    reason, code = RAW[status]
    body = ErrorResponse(error=Problem(code=code, message=message)).model_dump_json().encode()
    head = (
        f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n"
    )
    if status == 503:
        head += "retry-after: 1\r\n"
    return head.encode() + b"\r\n" + body
