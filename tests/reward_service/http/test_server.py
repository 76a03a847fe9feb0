"""The HTTP server on a real socket, against clients that misbehave."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI

from cluster.errors import InputError
from cluster.user_code import load
from reward_service.backend import Backend
from reward_service.config.service import HttpConfig, RewardServiceConfig
from reward_service.http.routes import build_app
from reward_service.http.server import MAX_HEAD_BYTES, http_server, listening_socket
from reward_service.http.tokens import TokenBook
from reward_service.serving.replica import RewardService
from tests.reward_service.http.test_contracts import ServiceBackend
from tests.support.functions import InProcessScorer

LIMITS: dict[str, Any] = {
    "header_timeout_s": 0.6,
    "body_timeout_s": 0.6,
    "write_timeout_s": 0.6,
    "max_body_bytes": 2**21,
    "max_connections": 40,
}
HEAD = b"POST /v1/rewards HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def serve(
    *, token: str | None = None, backend: Backend | None = None, routers: Sequence[APIRouter] = (), **limits: Any
) -> Iterator[tuple[str, int]]:
    """Start a server with a length scorer; yields host and port."""
    path = "tests.support.scorers:length"
    service = RewardService(RewardServiceConfig(scorer=path))
    service.take({path: InProcessScorer(path, load(path, "here"))})
    config = HttpConfig(**limits)
    app = build_app(
        backend or ServiceBackend(service), tokens=TokenBook(token), limits=config, timeout_s=5.0, routers=routers
    )
    bound = listening_socket("127.0.0.1", 0)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    server = http_server(app, config, drain_timeout_s=1)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])), daemon=True)
    thread.start()
    yield bound.getsockname()
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    yield from serve(**LIMITS)


def exchange(address: tuple[str, int], data: bytes, *, timeout_s: float = 5.0) -> tuple[bytes, float]:
    """Send bytes; returns what is received until the connection closes, and the seconds until then."""
    started = time.monotonic()
    with socket.create_connection(address, timeout=timeout_s) as connection:
        try:
            connection.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass
        received = b""
        while part := _read(connection):
            received += part
    return received, time.monotonic() - started


def _read(connection: socket.socket) -> bytes:
    try:
        return connection.recv(65536)
    except ConnectionResetError:
        return b""


def status_and_code(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)), 400, "malformed"),
        (b"\x00" * 1000, 400, "malformed"),
        (b"hello there\r\n\r\n", 400, "malformed"),
        (b"GET /healthz HTTP/9.9\r\n\r\n", 400, "malformed"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 2 * MAX_HEAD_BYTES, 431, "too_large"),
        (b"GET /" + b"a" * 2 * MAX_HEAD_BYTES, 431, "too_large"),
        (HEAD + b"Content-Length: 1073741824\r\n\r\n", 413, "too_large"),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400, "malformed"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400, "malformed"),
        (HEAD + b"Content-Encoding: gzip\r\nContent-Length: 9\r\n\r\n", 415, "unsupported_media_type"),
        (HEAD + b"Connection: close\r\nContent-Length: 10000\r\n\r\n" + b"[" * 10_000, 400, "malformed"),
    ],
)
def test_garbage_is_rejected_within_a_second(address: tuple[str, int], data: bytes, status: int, code: str) -> None:
    answer, seconds = exchange(address, data)
    assert status_and_code(answer) == (status, code)
    assert seconds < 1.5


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "the head of the request was not sent within 0.6 s"),
        (b"POST /v1/rewards HTTP/1.1\r\nHos", "the head of the request was not sent within 0.6 s"),
        (HEAD + b"Content-Length: 100\r\n\r\n{", "the body was not sent within 0.6 s"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", "the body was not sent within 0.6 s"),
    ],
)
def test_client_that_stops_sending_is_rejected_at_the_deadline(
    address: tuple[str, int], data: bytes, what: str
) -> None:
    answer, seconds = exchange(address, data)
    assert status_and_code(answer) == (408, "too_slow")
    assert what in answer.decode()
    assert 0.5 < seconds < 3


def test_slow_bytes_do_not_extend_the_deadline_of_a_head(address: tuple[str, int]) -> None:
    started = time.monotonic()
    with socket.create_connection(address, timeout=5) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\n")
        answer, num_sent = b"", 0
        while not answer and time.monotonic() - started < 5:
            connection.settimeout(0.05)
            try:
                connection.sendall(b"X: y\r\n")
                num_sent += 1
                answer = connection.recv(65536)
            except TimeoutError:
                continue
    assert status_and_code(answer) == (408, "too_slow")
    assert num_sent > 3


def test_client_gets_the_error_after_sending_a_body_too_large(address: tuple[str, int]) -> None:
    num_bytes = LIMITS["max_body_bytes"] * 3 // 2
    with socket.create_connection(address, timeout=5) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % num_bytes + b" " * num_bytes)
        received = b""
        while part := _read(connection):
            received += part
    assert status_and_code(received) == (413, "too_large")


async def test_response_is_not_delayed_by_tcp_acknowledgements() -> None:
    accepted = asyncio.get_running_loop().create_future()
    bound = listening_socket("127.0.0.1", 0)
    server = await asyncio.start_server(lambda _, writer: accepted.set_result(writer), sock=bound)
    async with server:
        _, client = await asyncio.open_connection(*bound.getsockname())
        writer = await accepted
        assert writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        for end in (writer, client):
            end.close()


def test_connections_beyond_the_limit_are_rejected(address: tuple[str, int]) -> None:
    held = [socket.create_connection(address, timeout=5) for _ in range(LIMITS["max_connections"])]
    try:
        answer, _ = exchange(address, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert status_and_code(answer) == (503, "unavailable")
    finally:
        for connection in held:
            connection.close()
    assert takes_connections_again(f"http://{address[0]}:{address[1]}")


def takes_connections_again(url: str, **options: Any) -> bool:
    """Return whether the server answers again within seconds after the extra connections closed."""
    for _ in range(100):
        try:
            if httpx.get(f"{url}/healthz", trust_env=False, **options).status_code == 200:
                return True
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    return False


def test_connection_is_reused(address: tuple[str, int]) -> None:
    request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(address, timeout=5) as connection:
        for _ in range(3):
            connection.sendall(request)
            received = b""
            while not received.endswith(b"}"):
                received += connection.recv(65536)
            assert received.startswith(b"HTTP/1.1 200")


def test_connection_closes_if_responses_are_not_read(address: tuple[str, int]) -> None:
    responses = ["x" * 64 for _ in range(4000)]
    ids = [f"{i:0200d}" for i in range(4000)]
    body = json.dumps({"prompts": responses, "responses": responses, "ids": ids}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(10)
        connection.connect(address)
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        time.sleep(2.5)
        received = b""
        while part := _read(connection):
            received += part
    assert received.startswith(b"HTTP/1.1 200")
    assert len(received) < len(body) // 2


def test_headers_after_the_body_are_rejected(address: tuple[str, int]) -> None:
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nAuthorization: Bearer x\r\n\r\n"
    assert status_and_code(exchange(address, chunked)[0]) == (400, "malformed")


def test_client_that_closed_its_sending_side_gets_its_response(address: tuple[str, int]) -> None:
    body = b'{"prompts": ["p"], "responses": ["abc"]}'
    with socket.create_connection(address, timeout=5) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while part := _read(connection):
            received += part
    assert received.startswith(b"HTTP/1.1 200")


class Endless:
    """A backend whose scoring never ends; records when it starts and when it is cancelled."""

    def __init__(self) -> None:
        self.started, self.stopped = threading.Event(), threading.Event()

    async def score(self, *_: Any, **__: Any) -> Any:
        self.started.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped.set()

    async def models(self, **_: Any) -> Any: ...


@pytest.mark.parametrize("is_reset", [True, False])
def test_scoring_is_cancelled_if_the_client_disconnects(is_reset: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reward_service.http.server.EOF_GRACE_S", 0.1)
    endless = Endless()
    body = b'{"prompts": ["p"], "responses": ["abc"]}'
    for address in serve(backend=endless):
        with socket.create_connection(address, timeout=5) as connection:
            if is_reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert endless.started.wait(5)
            assert not endless.stopped.is_set()
        assert endless.stopped.wait(5)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return settings with a new certificate for 127.0.0.1."""
    folder = tmp_path_factory.mktemp("tls")
    files = {"ssl_certfile": folder / "cert.pem", "ssl_keyfile": folder / "key.pem"}
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", files["ssl_keyfile"], "-out", files["ssl_certfile"]],
        check=True, capture_output=True,
    )  # fmt: skip
    return files


@pytest.mark.process
def test_https_is_served_with_a_certificate(certificate: dict[str, Any]) -> None:
    for host, port in serve(**certificate):
        context = ssl.create_default_context(cafile=str(certificate["ssl_certfile"]))
        with httpx.Client(base_url=f"https://{host}:{port}", verify=context, trust_env=False) as http:
            assert [http.get("/healthz").status_code for _ in range(3)] == [200] * 3
        answer, _ = exchange((host, port), b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"HTTP/1.1" not in answer


@pytest.mark.process
def test_handshake_has_a_deadline_and_counts_as_a_connection(certificate: dict[str, Any]) -> None:
    for address in serve(**certificate, header_timeout_s=0.6, max_connections=2):
        started = time.monotonic()
        with socket.create_connection(address, timeout=5) as one, socket.create_connection(address, timeout=5) as other:
            assert exchange(address, b"")[1] < 0.5, "one too many is cut off at once"
            assert [_read(connection) for connection in (one, other)] == [b"", b""]
        assert 0.5 < time.monotonic() - started < 3
        context = ssl.create_default_context(cafile=str(certificate["ssl_certfile"]))
        assert takes_connections_again(f"https://{address[0]}:{address[1]}", verify=context)


@pytest.mark.process
def test_invalid_certificate_is_named(tmp_path: Path, certificate: dict[str, Any]) -> None:
    (tmp_path / "none.pem").write_text("none")
    for files in (certificate | {"ssl_certfile": tmp_path / "none.pem"}, {"ssl_certfile": tmp_path / "missing.pem"}):
        with pytest.raises(InputError, match=rf"^reward_service\.http\.ssl_certfile: {tmp_path}/\w+\.pem"):
            http_server(FastAPI(), HttpConfig(**files), drain_timeout_s=1)


def test_taken_address_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match=rf"cannot listen on 127\.0\.0\.1:{taken.getsockname()[1]}"):
            listening_socket("127.0.0.1", taken.getsockname()[1])
