"""`antiphon serve-rewards`: the reward service by itself, on a Ray of its own, until it is interrupted.

The very application that a run uses; knows nothing of training.
"""

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
from deploy.run.layout import FEEDBACK
from deploy.runtime.services import announced
from reward_service.config.service import RewardServiceConfig
from reward_service.feedback.selection import FeedbackSettings
from reward_service.http.tokens import with_tokens
from reward_service.serving.application import (
    check_reward_service,
    face_ended,
    service_url,
    start_reward_service,
    stop_reward_service,
)

OBJECT_STORE_BYTES = 128 * 2**20


def serve_rewards(
    target_config: RewardServiceConfig,
    *,
    reward_model_path: Path | None,
    host: str,
    port: int,
    name: str,
    run_path: Path,
    feedback: FeedbackSettings = FeedbackSettings(),
) -> None:
    """Serve rewards on host:port; prints ``listening on URL`` when ready and returns after SIGINT or SIGTERM.

    Tokens are ANTIPHON_TOKEN and those of `antiphon token`. Where there is a run directory, people can give feedback at
    the same address, asked as `feedback` says, and `antiphon reward-model RUN` publishes what it trains to this
    service. Call it on the main thread. Raises InputError for a scorer that can't be had, a port that is taken, at the
    start or when its face is started again, and an address beyond loopback without a token.
    """
    if target_config.url is not None:
        raise InputError("reward_service.url", f"the rewards of this run are served elsewhere, at {target_config.url}")
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
    )


def _wait_for_interrupt(name: str) -> None:
    """Wait for a signal. Raises InputError where the service has lost its port meanwhile."""
    try:
        asyncio.run(face_ended(name))
    except KeyboardInterrupt:
        return


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
