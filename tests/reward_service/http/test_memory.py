"""Memory that hostile clients cost an HTTP server in a separate process: less than 50 MB."""

from __future__ import annotations

import gzip
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import psutil
import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.process

PROGRAM = """
import sys
from tests.reward_service.http.test_server import serve
for host, port in serve(header_timeout_s=0.6, body_timeout_s=0.6, write_timeout_s=0.6):
    print(host, port, flush=True)
    sys.stdin.read()
"""
MIB = 2**20
POST = b"POST /v1/rewards HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
Address = tuple[str, int]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[psutil.Process, Address]]:
    """Start an HTTP server and warm it up with good requests; yields its process and address."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    host, port = process.stdout.readline().split()
    for body in ({"prompts": ["p"], "responses": ["a"]}, {}):
        httpx.post(f"http://{host}:{port}/v1/rewards", json=body, trust_env=False)
    yield psutil.Process(process.pid), (host, int(port))
    process.communicate(timeout=30)
    assert process.returncode == 0


def send(address: Address, *parts: bytes, times: int = 1) -> bytes:
    """Send the pieces until all are sent or the connection ends; returns what was received."""
    received = b""
    with socket.create_connection(address, timeout=5) as connection:
        try:
            for _ in range(times):
                for part in parts:
                    connection.sendall(part)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            pass
        try:
            while part := connection.recv(65536):
                received += part
        except (ConnectionResetError, TimeoutError):
            pass
    return received


def raw_garbage(address: Address) -> None:
    noise = random.Random(0).randbytes(MIB)
    for start in range(0, MIB, MIB // 16):
        send(address, noise[start:], noise, times=4)


def slow_loris(address: Address) -> None:
    started = time.monotonic()
    connections = [socket.create_connection(address, timeout=5) for _ in range(200)]
    try:
        while time.monotonic() - started < 0.5:
            for connection in connections:
                connection.sendall(b"GET / HTTP/1.1\r\n" if time.monotonic() - started < 0.1 else b"X: y\r\n")
    except (BrokenPipeError, ConnectionResetError):
        pass
    assert all(connection.recv(65536).startswith(b"HTTP/1.1 4") for connection in connections)
    for connection in connections:
        connection.close()


def endless_chunks(address: Address) -> None:
    chunk = b"%x\r\n" % 2**16 + b" " * 2**16 + b"\r\n"
    assert b" 413 " in send(address, POST + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * (2**30 // 2**16))


def gzip_bombs(address: Address) -> None:
    bomb = gzip.compress(bytes(100 * MIB), compresslevel=1)
    for coding in (b"Content-Encoding", b"content-encoding"):
        head = POST + coding + b": gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
        assert send(address, head, bomb).startswith(b"HTTP/1.1 415")


def deep_json(address: Address) -> None:
    for body in (b"[" * 10_000, b'{"a":' * 10_000, b"[" * 15 * MIB, b"[" + b"[]," * 4 * MIB + b"[]]"):
        head = POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        assert send(address, head, body).startswith(b"HTTP/1.1 400")


def pipelining(address: Address) -> None:
    assert send(address, GET * 1000, times=1000).count(b"HTTP/1.1 ") <= 1


@pytest.mark.parametrize("attack", [raw_garbage, slow_loris, endless_chunks, gzip_bombs, deep_json, pipelining])
def test_a_hostile_client_costs_less_than_fifty_megabytes(
    server: tuple[psutil.Process, Address], attack: Callable[[Address], None]
) -> None:
    process, address = server
    before = peak = process.memory_info().rss
    is_over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_over.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        attack(address)
    finally:
        is_over.set()
        watching.join()
    peak = max(peak, process.memory_info().rss)
    assert peak - before < 50 * MIB
    assert httpx.get(f"http://{address[0]}:{address[1]}/healthz", trust_env=False).status_code == 200
