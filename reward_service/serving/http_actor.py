"""The HTTP face in a process of its own: a Ray actor that listens, guards, and asks the application by its handle.

Serve's own proxy is not used: it holds bodies without bound and answers its own routes to anyone. One that dies is
started again by Ray and listens on the same port.
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


def face_name(run_name: str) -> str:
    """Under which the face of that run's service is registered."""
    return f"antiphon-{run_name}-face"


class FaceActor:
    """Listens from its constructor on; with a `feedback_path` people can give feedback here too, which is kept there,
    and are asked as `feedback` says.

    An address that can't be had, or that other machines can reach without a token, is an InputError of `listening` and
    `ended`, not of the constructor: Ray, which starts the face again, would tell nobody.
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
        """Listen to the end; one that nobody asked for ends the process, so that Ray starts it again."""
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
        """Wait until connections are taken. Raises RewardError where the server ended or does not come up."""
        thread = self._running()
        for _ in range(int(START_TIMEOUT_S / 0.05)):
            if self._server.started and thread.is_alive():
                return
            if not thread.is_alive():
                break
            await asyncio.sleep(0.05)
        raise RewardError("reward_service", "its HTTP face does not listen (its log says why)")

    async def ended(self) -> None:
        """Wait until no more connections are taken, which `drain` brings about; a face that is started again goes on
        waiting. Raises InputError where it could not listen then."""
        await asyncio.to_thread(self._running().join)

    async def pid(self) -> int:
        """The process that listens."""
        return os.getpid()

    async def drain(self) -> None:
        """Take no more connections and wait until the requests under way are answered."""
        thread = self._running()
        self._server.should_exit = True
        await asyncio.to_thread(thread.join)
