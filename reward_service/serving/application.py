"""Runs the reward service as a Ray Serve application, called by handle and, with a port, by HTTP.

Both ways lead to the same scorers and the same counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray import serve
from ray.serve.config import ProxyLocation
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, LoggingConfig

from cluster.actors.remote import RemoteActor, kill_actor, redirect_output, start_actor, within
from cluster.errors import ActorDied, DeadlineExceeded, InputError, RewardError
from reward_service.config.scorers import TrainedModelConfig
from reward_service.config.service import REWARD_MODEL, RewardServiceConfig, app_name
from reward_service.feedback.selection import FeedbackSettings
from reward_service.http.address import check_address
from reward_service.scorers.registry import check_scorers
from reward_service.serving.http_actor import START_TIMEOUT_S as HTTP_START_TIMEOUT_S
from reward_service.serving.http_actor import HttpServerActor, http_actor_name
from reward_service.serving.replica import RewardService
from reward_service.serving.versions import Models, ModelVersions, published

START_TIMEOUT_S = 300.0
CALL_TIMEOUT_S = 30.0
DRAIN_TIMEOUT_S = 15.0
HEALTH_EVERY_S = 2.0
MAX_ONGOING_REQUESTS = 256
MAX_QUEUED_REQUESTS = 4096
WHERE = "reward_service"
_http_actors: dict[str, RemoteActor] = {}
"""The HTTP servers that this process started: Ray ends an actor, even a named one, if its first handle is dropped."""


class Deployed(NamedTuple):
    """The arguments of an application's replicas. Serve replaces its replicas if `version` changes.

    `owner` is the Ray job of the process that started the application.
    """

    config: RewardServiceConfig
    log_path: Path | None
    version: str
    owner: str


class RewardDeployment(RewardService):
    """One replica, in a separate process."""

    def __init__(self, config: RewardServiceConfig, log_path: Path | None, deployed_as: str, owner: str) -> None:
        if log_path is not None:
            redirect_output(log_path)
        super().__init__(config)
        self._log_path = log_path
        self._deployed_as = deployed_as
        self._owner = owner
        self._versions = ModelVersions({}, {})

    async def reconfigure(self, models: Mapping[str, Any]) -> None:
        """Load new reward models. Serve calls this at the start and for every change of `user_config`."""
        versions = ModelVersions.from_json(models)
        await self.load(versions)
        self._versions = versions

    async def deployed_with(self) -> tuple[Deployed, ModelVersions]:
        """Return how the application was deployed, and its current reward models."""
        return Deployed(self._config, self._log_path, self._deployed_as, self._owner), self._versions

    async def pid(self) -> int:
        """Return the id of this replica's process."""
        return os.getpid()


def check_reward_service(config: RewardServiceConfig, *, reward_model_path: Path | None, token: str | None) -> None:
    """Raise InputError for settings that can't work: a missing scorer, a taken port, a missing token."""
    check_scorers(config, reward_model_path)
    check_address(config, token)


def start_reward_service(
    config: RewardServiceConfig,
    *,
    name: str,
    reward_model_path: Path | None,
    token: str | None,
    log_path: Path | None = None,
    feedback_path: Path | None = None,
    feedback: FeedbackSettings = FeedbackSettings(),
    cancelled: threading.Event | None = None,
) -> Any:
    """Start the application of run `name` on this process's Ray; returns its handle when it is ready.

    The content of `reward_model_path` must not change while the application runs: replicas that start later read it
    too. With a port and a `feedback_path`, the same address accepts human feedback by the settings `feedback`.
    Blocks for seconds (a reward model is loaded): call it from a thread, and set `cancelled` to end it early.
    Replaces an application of this name that this process or an ended one has started. Raises InputError for settings
    that can't work, before anything is started, and if a running process has started the application; RewardError if
    the application does not start or the start is cancelled.
    """
    cancelled = cancelled or threading.Event()
    check_reward_service(config, reward_model_path=reward_model_path, token=token)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location=ProxyLocation.Disabled, logging_config=_quiet())
    owner = ray.get_runtime_context().get_job_id()
    _require_no_other_owner(app_name(name), owner)
    models = _models(config, reward_model_path)
    try:
        _deploy(Deployed(config, log_path, secrets.token_hex(6), owner), name, ModelVersions(models, models), cancelled)
        if config.port is not None:
            _start_http_server(config, name, log_path, token, feedback_path, feedback)
    except BaseException:
        stop_reward_service(name)
        raise
    return serve.get_app_handle(app_name(name))


def _require_no_other_owner(application: str, owner: str) -> None:
    """Raise InputError if another process that still runs has started the application."""
    from ray._private.state import jobs  # Ray's public list of jobs needs its dashboard

    overview = serve.status().applications.get(application)
    if overview is None or overview.status != ApplicationStatus.RUNNING:
        return
    handle: Any = serve.get_app_handle(application)
    deployed, _ = handle.broadcast("deployed_with").results(timeout_s=CALL_TIMEOUT_S)[0]
    running = {job["JobID"] for job in jobs() if not job["IsDead"]}
    if deployed.owner != owner and deployed.owner in running:
        raise InputError(application, "another process on this Ray serves rewards under this name: stop it first")


def publish_reward_model(name: str, folder: Path, *, scorer: str = REWARD_MODEL) -> None:
    """Publish the reward model in `folder` to run `name`'s application, as the scorer `scorer`.

    Every replica loads it beside the current one, which serves until then and can still be requested by its version,
    also from replicas that start later: so the folder must not change. Returns when all replicas serve the new model.
    Raises InputError, before anything changes, if no such application runs or the folder is not a model.
    """
    from reward_service.scorers.reward_model import RewardModelScorer

    try:
        handle: Any = serve.get_app_handle(app_name(name))
    except RayServeException as error:
        raise InputError(app_name(name), "no such application runs on this Ray") from error
    RewardModelScorer(folder)
    deployed, versions = handle.broadcast("deployed_with").results(timeout_s=CALL_TIMEOUT_S)[0]
    if scorer not in versions.present:
        raise InputError(app_name(name), f"serves no reward model named {scorer}")
    model = published(folder)
    if model.digest != versions.present[scorer].digest:
        _deploy(deployed, name, versions.followed_by(scorer, model), threading.Event())


async def http_server_ended(name: str) -> None:
    """Wait until run `name`'s HTTP server has ended, if this process started it.

    `stop_reward_service` ends it. Returns immediately if there is none. Raises InputError if Ray restarted it and its
    port was taken by then.
    """
    if name in _http_actors:
        await _http_actors[name].ended()


def stop_reward_service(name: str) -> None:
    """End run `name`'s application and HTTP server; leave the rest of Serve alone.

    Call it from a thread without an event loop. The HTTP server first answers pending requests, for a limited time.
    """
    actor = _http_actors.pop(name, None)
    if actor is not None:
        with contextlib.suppress(DeadlineExceeded, ActorDied, InputError):  # requests still pending are cut off
            waited_for = "its HTTP server to answer pending requests"
            asyncio.run(within(actor.drain(), DRAIN_TIMEOUT_S, where=WHERE, waited_for=waited_for))
        kill_actor(actor)
    with contextlib.suppress(RayServeException):  # Serve does not run on this Ray: there is nothing to delete
        serve.delete(app_name(name))


def num_scored(name: str) -> int:
    """Return how many items got a reward from the application of run `name`, over all its replicas."""
    handle: Any = serve.get_app_handle(app_name(name))
    return sum(handle.broadcast("num_scored").results(timeout_s=CALL_TIMEOUT_S))


def service_url(config: RewardServiceConfig) -> str:
    """Return the URL of the HTTP server."""
    scheme = "https" if config.http.ssl_certfile else "http"
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"{scheme}://{host}:{config.port}"


def _quiet() -> LoggingConfig:
    return LoggingConfig(log_level="WARNING", enable_access_log=False)


def _models(config: RewardServiceConfig, reward_model_path: Path | None) -> Models:
    """Return the reward models of the settings, including the run's own if it is needed."""
    scorers = {name: scorer for name, scorer in config.scorers.items() if isinstance(scorer, TrainedModelConfig)}
    folders = {name: scorer.folder() for name, scorer in scorers.items()}
    if config.needs_reward_model():
        assert reward_model_path is not None
        folders[REWARD_MODEL] = reward_model_path
    return {name: published(folder) for name, folder in folders.items()}


def _deploy(deployed: Deployed, name: str, versions: ModelVersions, cancelled: threading.Event) -> None:
    config = deployed.config
    deployment = serve.deployment(RewardDeployment).options(
        name="rewards",
        version=deployed.version,
        user_config=versions.to_json(),
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_queued_requests=MAX_QUEUED_REQUESTS,
        health_check_period_s=HEALTH_EVERY_S,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
        max_constructor_retry_count=1,
        logging_config=_quiet(),
        _internal=True,
        **_num_replicas(config),
    )
    application = app_name(name)
    target = serve.RunTarget(target=deployment.bind(*deployed), name=application, route_prefix=None)
    serve.run_many([target], wait_for_applications_running=False)
    _await_running(application, cancelled)


def _num_replicas(config: RewardServiceConfig) -> dict[str, Any]:
    if config.max_replicas is None:
        return {"num_replicas": config.num_replicas}
    return {"autoscaling_config": {"min_replicas": config.num_replicas, "max_replicas": config.max_replicas}}


def _await_running(application: str, cancelled: threading.Event) -> None:
    """Wait until Serve reports the application as running. Raises RewardError with Serve's message."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        if cancelled.is_set():
            raise RewardError(WHERE, "its start was cancelled")
        overview = serve.status().applications.get(application)
        status = overview.status if overview else None
        if status == ApplicationStatus.RUNNING:
            return
        message = overview.message if overview else "unknown to Ray Serve"
        if status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise RewardError(WHERE, f"did not start: {message}")
        if time.monotonic() > deadline:
            raise RewardError(WHERE, f"did not start within {START_TIMEOUT_S:g} s ({status}): {message}")
        time.sleep(0.1)


def _start_http_server(config: RewardServiceConfig, name: str, log_path: Path | None, *args: Any) -> None:
    """Start the HTTP server and wait until it listens. Raises RewardError if it does not."""
    _http_actors[name] = actor = start_actor(
        HttpServerActor,
        config,
        app_name(name),
        *args,
        name="reward_service's HTTP server",
        registered_as=http_actor_name(name),
        log_path=log_path,
        pinned_and_restarted=True,
    )
    timeout_s = 2 * HTTP_START_TIMEOUT_S
    asyncio.run(within(actor.listening(), timeout_s, where=WHERE, waited_for="its HTTP server to listen"))
