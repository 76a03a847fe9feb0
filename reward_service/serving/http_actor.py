"""Runs the HTTP server in a Ray actor, which calls the application by its handle.

Serve's own proxy is not used: it buffers bodies without limit and has routes without access control. If the actor
dies, Ray restarts it, and it listens on the same port.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from fastapi import APIRouter

from cluster.errors import AntiphonError, RewardError
from reward_service.client.handle import HandleBackend
from reward_service.config.service import RewardServiceConfig
from reward_service.feedback.routes import feedback_router
from reward_service.feedback.selection import FeedbackSettings
from reward_service.feedback.store import FeedbackStore
from reward_service.http.address import require_token
from reward_service.http.routes import build_app
from reward_service.http.server import http_server, listening_socket
from reward_service.http.tokens import token_book

START_TIMEOUT_S = 30.0


def http_actor_name(run_name: str) -> str:
    """Return the name under which the run's HTTP server is registered with Ray."""
    return f"antiphon-{run_name}-http"


class HttpServerActor:
    """Starts listening in its constructor.

    With a `feedback_path` it also accepts human feedback and stores it there.

    A taken address, or one that other machines can reach without a token, is an InputError raised by `listening` and
    `ended`, not by the constructor: Ray would restart the actor and hide the error.
    """

    def __init__(
        self,
        config: RewardServiceConfig,
        application: str,
        token: str | None,
        feedback_path: Path | None,
        feedback: FeedbackSettings,
    ) -> None:
        self._thread: threading.Thread | None = None
        self._failure: AntiphonError | None = None
        try:
            require_token(config, token)
            routers = []
            if feedback_path is not None:
                routers.append(feedback_router(FeedbackStore(feedback_path), settings=feedback))
            self._listen(config, application, token, routers)
        except AntiphonError as error:
            self._failure = error

    def _listen(
        self, config: RewardServiceConfig, application: str, token: str | None, routers: Sequence[APIRouter]
    ) -> None:
        assert config.port is not None
        app = build_app(
            HandleBackend(application),
            tokens=token_book(config, token),
            limits=config.http,
            timeout_s=config.timeout_s,
            routers=routers,
        )
        self._server = http_server(app, config.http, drain_timeout_s=config.drain_timeout_s)
        self._socket = listening_socket(config.host, config.port)
        self._thread = threading.Thread(target=self._serve, name="http", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        """Serve until `drain`; after any other end, exit the process, so that Ray restarts it."""
        try:
            asyncio.run(self._server.serve(sockets=[self._socket]))
        finally:
            if not self._server.should_exit:
                os._exit(1)

    def _running(self) -> threading.Thread:
        if self._failure is not None:
            raise self._failure
        assert self._thread is not None
        return self._thread

    async def listening(self) -> None:
        """Wait until the server accepts connections. Raises RewardError if it ended or does not start."""
        thread = self._running()
        for _ in range(int(START_TIMEOUT_S / 0.05)):
            if self._server.started and thread.is_alive():
                return
            if not thread.is_alive():
                break
            await asyncio.sleep(0.05)
        raise RewardError("reward_service", "its HTTP server does not listen: see its log")

    async def ended(self) -> None:
        """Wait until `drain` ends the server, across restarts.

        Raises InputError if a restarted one can't listen.
        """
        await asyncio.to_thread(self._running().join)

    async def pid(self) -> int:
        """Return the id of the process that listens."""
        return os.getpid()

    async def drain(self) -> None:
        """Accept no more connections and wait until pending requests are answered."""
        thread = self._running()
        self._server.should_exit = True
        await asyncio.to_thread(thread.join)
