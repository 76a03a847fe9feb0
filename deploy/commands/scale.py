"""Changes the number of rollout actors of a run that is under way, from another process.

Knows where a run says that it is (status.json) and the name of the actor that takes the wish.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import ray

from cluster.actors.control import control_name
from cluster.actors.remote import NAMESPACE, find_actor, within
from cluster.errors import InputError
from deploy.config.load import read_run_config
from deploy.run.layout import CONFIG
from deploy.run.open import require_run
from deploy.runtime.connect import answers

ANSWER_TIMEOUT_S = 30.0


def scale(run_path: Path, num_rollout_actors: int) -> int:
    """Ask the run for that many rollout actors; returns the number asked for before, without waiting for them.

    Raises InputError when the run is not in its PPO stage, where rollout actors sample.
    """
    run = require_run(run_path)
    status = run.status()
    if status.state != "RUNNING" or status.ray_address is None:
        raise InputError(str(run_path), f"is not running ({status.state})")
    name = read_run_config(run_path / CONFIG).run.name
    if not answers(status.ray_address):
        raise InputError(str(run_path), f"no Ray answers at {status.ray_address}: the run's process is gone")
    ray.init(status.ray_address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.CRITICAL)
    try:
        return asyncio.run(_ask(control_name(name), num_rollout_actors))
    finally:
        ray.shutdown()


async def _ask(registered_as: str, num_rollout_actors: int) -> int:
    control = find_actor(registered_as)
    before = await within(
        control.set_num_rollout_actors(num_rollout_actors),
        ANSWER_TIMEOUT_S,
        where=registered_as,
        waited_for="the run to take the wish",
    )
    return int(before)
