"""The reward service as a Ray Serve application: one deployment, reached by handle and, where a port is set, HTTP.

Both ways lead to the same scorers and the same count. Knows nothing of runs but a name.
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
from reward_service.serving.http_actor import START_TIMEOUT_S as FACE_TIMEOUT_S
from reward_service.serving.http_actor import FaceActor, face_name
from reward_service.serving.replica import RewardService
from reward_service.serving.versions import Models, ModelVersions, published

START_TIMEOUT_S = 300.0
CALL_TIMEOUT_S = 30.0
DRAIN_TIMEOUT_S = 15.0
HEALTH_EVERY_S = 2.0
MAX_ONGOING_REQUESTS = 256
MAX_QUEUED_REQUESTS = 4096
WHERE = "reward_service"
_faces: dict[str, RemoteActor] = {}
"""The faces that this process started: Ray ends an actor, named or not, whose first handle nobody holds."""


class Deployed(NamedTuple):
    """What the replicas of an application are made of. Serve starts others in their place where `version` differs."""

    config: RewardServiceConfig
    log_path: Path | None
    version: str


class RewardDeployment(RewardService):
    """One replica, in a process of its own."""

    def __init__(self, config: RewardServiceConfig, log_path: Path | None, deployed_as: str) -> None:
        if log_path is not None:
            redirect_output(log_path)
        super().__init__(config)
        self._log_path = log_path
        self._deployed_as = deployed_as
        self._versions = ModelVersions({}, {})

    async def reconfigure(self, models: Mapping[str, Any]) -> None:
        """Serve's word for new settings, at the start too: the reward models."""
        versions = ModelVersions.from_json(models)
        await self.load(versions)
        self._versions = versions

    async def deployed_with(self) -> tuple[Deployed, ModelVersions]:
        """How the application was deployed, and the reward models that it has now."""
        return Deployed(self._config, self._log_path, self._deployed_as), self._versions

    async def pid(self) -> int:
        """This replica's process."""
        return os.getpid()


def check_reward_service(config: RewardServiceConfig, *, reward_model_path: Path | None, token: str | None) -> None:
    """Raise InputError for settings that can't work: no such scorer, a taken port, no token beyond loopback."""
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
    unwanted: threading.Event | None = None,
) -> Any:
    """Start the application of run `name` on the Ray this process is connected to; returns its handle when ready.

    `reward_model_path` has to stay as it is while the application runs: replicas that start later read it too. Where it
    has a port and a `feedback_path`, people can give feedback at the same address, asked as `feedback` says.
    Blocks for seconds (a reward model is loaded): call it from a thread, which ends soon after `unwanted` is set.
    Raises InputError for settings that can't work, before anything is started, and RewardError when the application
    does not come up or is not wanted any more.
    """
    unwanted = unwanted or threading.Event()
    check_reward_service(config, reward_model_path=reward_model_path, token=token)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location=ProxyLocation.Disabled, logging_config=_quiet())
    models = _models(config, reward_model_path)
    try:
        _deploy(Deployed(config, log_path, secrets.token_hex(6)), name, ModelVersions(models, models), unwanted)
        if config.port is not None:
            _start_face(config, name, log_path, token, feedback_path, feedback)
    except BaseException:
        stop_reward_service(name)
        raise
    return serve.get_app_handle(app_name(name))


def publish_reward_model(name: str, folder: Path, *, scorer: str = REWARD_MODEL) -> None:
    """Have the running application of run `name` serve the reward model in `folder` from now on, under that name.

    Every replica loads it beside the present one, which serves until then and can still be asked for by its version,
    of replicas too that start later: so the folder has to stay as it is. Returns when all have it. Raises InputError
    where no such application runs and for a folder that is no model, before anything changes.
    """
    from reward_service.scorers.reward_model import RewardModelScorer

    try:
        handle: Any = serve.get_app_handle(app_name(name))
    except RayServeException as error:
        raise InputError(app_name(name), "no such application runs on this Ray") from error
    RewardModelScorer(folder)
    deployed, versions = handle.broadcast("deployed_with").results(timeout_s=CALL_TIMEOUT_S)[0]
    if scorer not in versions.present:
        raise InputError(app_name(name), f"serves no reward model {scorer}")
    model = published(folder)
    if model.digest != versions.present[scorer].digest:
        _deploy(deployed, name, versions.followed_by(scorer, model), threading.Event())


async def face_ended(name: str) -> None:
    """Wait for the end of the face of run `name` that this process started; `stop_reward_service` brings it about.

    Returns at once where there is none. Raises InputError where Ray started it again and its port was taken.
    """
    if name in _faces:
        await _faces[name].ended()


def stop_reward_service(name: str) -> None:
    """End the application of run `name` and the face that this process started, and nothing else that Serve runs.

    Call it from a thread without an event loop: the face answers first what it has, for a bounded time.
    """
    face = _faces.pop(name, None)
    if face is not None:
        with contextlib.suppress(DeadlineExceeded, ActorDied, InputError):  # what it has not answered is cut off
            waited_for = "its HTTP face to answer what it has"
            asyncio.run(within(face.drain(), DRAIN_TIMEOUT_S, where=WHERE, waited_for=waited_for))
        kill_actor(face)
    with contextlib.suppress(RayServeException):  # no Serve runs on this Ray, so nothing of ours does
        serve.delete(app_name(name))


def num_scored(name: str) -> int:
    """Items given a reward by the application of run `name`, over all its replicas."""
    handle: Any = serve.get_app_handle(app_name(name))
    return sum(handle.broadcast("num_scored").results(timeout_s=CALL_TIMEOUT_S))


def service_url(config: RewardServiceConfig) -> str:
    """Where the HTTP face is reached."""
    scheme = "https" if config.http.ssl_certfile else "http"
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"{scheme}://{host}:{config.port}"


def _quiet() -> LoggingConfig:
    return LoggingConfig(log_level="WARNING", enable_access_log=False)


def _models(config: RewardServiceConfig, reward_model_path: Path | None) -> Models:
    """The reward models of the settings, the run's own among them where it is needed."""
    scorers = {name: scorer for name, scorer in config.scorers.items() if isinstance(scorer, TrainedModelConfig)}
    folders = {name: scorer.path for name, scorer in scorers.items()}
    if config.needs_reward_model():
        assert reward_model_path is not None
        folders[REWARD_MODEL] = reward_model_path
    return {name: published(folder) for name, folder in folders.items()}


def _deploy(deployed: Deployed, name: str, versions: ModelVersions, unwanted: threading.Event) -> None:
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
    _await_running(application, unwanted)


def _num_replicas(config: RewardServiceConfig) -> dict[str, Any]:
    if config.max_replicas is None:
        return {"num_replicas": config.num_replicas}
    return {"autoscaling_config": {"min_replicas": config.num_replicas, "max_replicas": config.max_replicas}}


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


def _start_face(config: RewardServiceConfig, name: str, log_path: Path | None, *args: Any) -> None:
    """Start the HTTP face and wait until it listens. Raises RewardError when it does not."""
    _faces[name] = face = start_actor(
        FaceActor,
        config,
        app_name(name),
        *args,
        name="reward_service's HTTP face",
        registered_as=face_name(name),
        log_path=log_path,
        pinned_and_restarted=True,
    )
    asyncio.run(within(face.listening(), 2 * FACE_TIMEOUT_S, where=WHERE, waited_for="its HTTP face to listen"))
