"""Run the reward service without training, on a separate local Ray, until it is interrupted."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import sys
from pathlib import Path
from types import FrameType

import ray

from cluster.errors import InputError
from cluster.user_code import python_path
from deploy.run.layout import FEEDBACK
from deploy.runtime.services import announced
from reward_service.config.service import RewardServiceConfig
from reward_service.feedback.selection import FeedbackSettings
from reward_service.http.tokens import with_tokens
from reward_service.serving.application import (
    check_reward_service,
    http_server_ended,
    service_url,
    start_reward_service,
    stop_reward_service,
)

OBJECT_STORE_BYTES = 128 * 2**20


def serve(
    target_config: RewardServiceConfig,
    *,
    reward_model_path: Path | None,
    host: str,
    port: int,
    name: str,
    run_path: Path,
    feedback: FeedbackSettings = FeedbackSettings(),
) -> None:
    """Serve rewards on host:port; prints ``listening on URL`` and returns after SIGINT or SIGTERM.

    Accepts ANTIPHON_TOKEN and the tokens of `antiphon token`. If the run directory exists, the service also collects
    feedback with the settings `feedback`, and `antiphon reward-model RUN` publishes new models to it. Call it on the
    main thread. Raises InputError if a scorer cannot be loaded, if the port is taken (at the start or when the HTTP
    actor is restarted), and for an address beyond loopback without a token.
    """
    if target_config.url is not None:
        raise InputError(
            "reward_service.url", f"this run uses the reward service at {target_config.url}; there is nothing to serve"
        )
    config = with_tokens(target_config, run_path).model_copy(update={"host": host, "port": port})
    token = os.environ.get("ANTIPHON_TOKEN") or None
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    check_reward_service(config, reward_model_path=reward_model_path, token=token)
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _start_ray(config)
        for number in previous:
            signal.signal(number, _interrupt)
        start_reward_service(
            config,
            name=name,
            reward_model_path=reward_model_path,
            token=token,
            feedback_path=run_path / FEEDBACK if run_path.is_dir() else None,
            feedback=feedback,
        )
        address = str(ray.get_runtime_context().gcs_address)
        with announced(run_path, port=port, ray_address=address, name=name):
            print(f"listening on {service_url(config)}", flush=True)
            _wait_for_interrupt(name)
        stop_reward_service(name)
    except KeyboardInterrupt:
        return
    finally:
        for number in previous:
            signal.signal(number, signal.SIG_IGN)
        if ray.is_initialized():
            ray.shutdown()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _start_ray(config: RewardServiceConfig) -> None:
    num_cpus = max(os.cpu_count() or 1, math.ceil(config.num_replicas * config.num_cpus))
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=OBJECT_STORE_BYTES,
        runtime_env={"env_vars": {"PYTHONPATH": python_path()}},
    )


def _wait_for_interrupt(name: str) -> None:
    """Wait for a signal. Raises InputError if the service loses its port."""
    try:
        asyncio.run(http_server_ended(name))
    except KeyboardInterrupt:
        return


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
