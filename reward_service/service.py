"""The reward service as a Ray Serve application: one deployment, reached by handle and, where a port is set, HTTP.

Both ways lead to the same scorer and the same count. Knows nothing of runs but a name.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import ProxyLocation
from ray.serve.schema import ApplicationStatus, LoggingConfig
from starlette.types import ASGIApp

from cluster.errors import InputError, RewardError
from cluster.remote import redirect_output
from cluster.scoring import Score, ScoreRequest
from reward_service.address import check_address
from reward_service.config import RewardServiceConfig, app_name
from reward_service.http_face import build_app
from reward_service.registry import build_scorer, check_scorer
from reward_service.scorer import Outcome, Scorer

START_TIMEOUT_S = 300.0
HTTP_TIMEOUT_S = 60.0
COUNT_TIMEOUT_S = 30.0
MAX_ONGOING_REQUESTS = 256
MAX_QUEUED_REQUESTS = 4096
WHERE = "reward_service"


class RewardService:
    """Scores requests with one scorer and counts the items that got a reward."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer_name = scorer.name
        self.scorer_version = scorer.version
        self._scorer = scorer
        self._num_scored = 0

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """One outcome a request, in their order: its score, or the RewardError in its place."""
        outcomes = await self._scorer.score(requests)
        self._num_scored += sum(isinstance(outcome, Score) for outcome in outcomes)
        return outcomes

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """One score a request, in their order. Raises the RewardError of the first item that has none."""
        scores = []
        for outcome in await self.outcomes(requests):
            if isinstance(outcome, RewardError):
                raise outcome
            scores.append(outcome)
        return scores

    async def num_scored(self) -> int:
        """Items given a reward since this replica started."""
        return self._num_scored


@serve.ingress()
class RewardDeployment(RewardService):
    """One replica: builds its scorer in its own process."""

    def __init__(
        self, config: RewardServiceConfig, reward_model_path: Path | None, token: str | None, log_path: Path | None
    ) -> None:
        if log_path is not None:
            redirect_output(log_path)
        super().__init__(build_scorer(config, reward_model_path))
        self._token = token
        self._timeout_s = config.timeout_s

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return build_app(self, token=self._token, timeout_s=self._timeout_s)


def check_reward_service(config: RewardServiceConfig, *, reward_model_path: Path | None, token: str | None) -> None:
    """Raise InputError for settings that can't work: no such scorer, a taken port, no token beyond loopback."""
    check_scorer(config, reward_model_path)
    check_address(config, token)


def start_reward_service(
    config: RewardServiceConfig,
    *,
    name: str,
    reward_model_path: Path | None,
    token: str | None,
    log_path: Path | None = None,
    unwanted: threading.Event | None = None,
) -> Any:
    """Start the application of run `name` on the Ray this process is connected to; returns its handle when ready.

    Blocks for seconds (a reward model is loaded): call it from a thread, which ends soon after `unwanted` is set.
    Raises InputError for settings that can't work, before anything is started, and RewardError when the application
    does not come up or is not wanted any more.
    """
    unwanted = unwanted or threading.Event()
    check_reward_service(config, reward_model_path=reward_model_path, token=token)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    _start_serve(config)
    application = app_name(name)
    try:
        _deploy(config, application, (config, reward_model_path, token, log_path), unwanted)
        if config.port is not None:
            _await_http(config.host, config.port)
    except BaseException:
        serve.delete(application)
        raise
    return serve.get_app_handle(application)


def stop_reward_service(name: str) -> None:
    """Delete the application of run `name`, and nothing else that Serve runs."""
    serve.delete(app_name(name))


def num_scored(name: str) -> int:
    """Items given a reward by the application of run `name`, over all its replicas."""
    handle: Any = serve.get_app_handle(app_name(name))
    return sum(handle.broadcast("num_scored").results(timeout_s=COUNT_TIMEOUT_S))


def service_url(host: str, port: int) -> str:
    """Where the HTTP face is reached."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _reached_at(host: str) -> str:
    """Where this machine reaches what is bound to `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _start_serve(config: RewardServiceConfig) -> None:
    """Start Serve where it is not running. Raises InputError when it runs already and listens elsewhere or nowhere."""
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    if config.port is None:
        serve.start(proxy_location=ProxyLocation.Disabled, logging_config=quiet)
        return
    http = {"host": config.host, "port": config.port}
    serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=http, logging_config=quiet)
    try:
        socket.create_connection((_reached_at(config.host), config.port), timeout=5).close()
    except OSError as error:
        what = f"Ray Serve already runs on this Ray and does not listen on {config.host}:{config.port}"
        raise InputError("reward_service.port", what) from error


def _deploy(
    config: RewardServiceConfig, application: str, arguments: tuple[Any, ...], unwanted: threading.Event
) -> None:
    deployment = serve.deployment(RewardDeployment).options(
        name="rewards",
        num_replicas=config.num_replicas,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_queued_requests=MAX_QUEUED_REQUESTS,
        graceful_shutdown_timeout_s=2,
        graceful_shutdown_wait_loop_s=0.1,
        max_constructor_retry_count=1,
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    target = serve.RunTarget(
        target=deployment.bind(*arguments), name=application, route_prefix=None if config.port is None else "/"
    )
    serve.run_many([target], wait_for_applications_running=False)
    _await_running(application, unwanted)


def _await_running(application: str, unwanted: threading.Event) -> None:
    """Wait for Serve to report the application running. Raises RewardError with Serve's own words."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        if unwanted.is_set():
            raise RewardError(WHERE, "its start was given up")
        overview = serve.status().applications.get(application)
        status = overview.status if overview else None
        if status == ApplicationStatus.RUNNING:
            return
        said = overview.message if overview else "unknown to Ray Serve"
        if status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise RewardError(WHERE, f"did not start: {said}")
        if time.monotonic() > deadline:
            raise RewardError(WHERE, f"did not start within {START_TIMEOUT_S:g} s ({status}): {said}")
        time.sleep(0.1)


def _await_http(host: str, port: int) -> None:
    """Wait for the proxy to route to the application. Raises RewardError when it does not."""
    url = service_url(_reached_at(host), port) + "/healthz"
    deadline = time.monotonic() + HTTP_TIMEOUT_S
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            with opener.open(url, timeout=5):
                return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise RewardError(WHERE, f"{url} did not answer within {HTTP_TIMEOUT_S:g} s: {error}") from error
        time.sleep(0.1)
