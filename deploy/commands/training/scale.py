"""`antiphon scale`: change the number of rollout actors of a running run, from another process."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Annotated

import typer

from cluster.actors.control import control_name
from cluster.errors import InputError
from deploy.commands.arguments import Run
from deploy.config.load import read_run_config
from deploy.run.layout import CONFIG
from deploy.run.open import require_run
from deploy.runtime.connect import answers, use_own_token

ANSWER_TIMEOUT_S = 30.0


def scale(run: Run, rollout_actors: Annotated[int, typer.Option(min=1, help="New number of rollout actors.")]) -> None:
    """Change the number of rollout actors of a run while it trains.

    Turns off autoscaling (rollout_actors.max_actors) for the rest of the command that trains.

    [dim]antiphon scale runs/reviews --rollout-actors 3[/dim]
    """
    use_own_token()
    before = set_num_rollout_actors(run, rollout_actors)
    print(f"rollout actors: {before} -> {rollout_actors}")


def set_num_rollout_actors(run_path: Path, num_rollout_actors: int) -> int:
    """Set the number of rollout actors; returns the previous number without waiting for the change.

    Raises InputError if the run is not in its PPO stage, the only one with rollout actors to scale.
    """
    run = require_run(run_path)
    status = run.status()
    if status.state != "RUNNING" or status.ray_address is None:
        raise InputError(str(run_path), f"is not running ({status.state})")
    name = run.name_on_ray(read_run_config(run_path / CONFIG).run.name)
    if not answers(status.ray_address):
        raise InputError(str(run_path), f"no Ray answers at {status.ray_address}: the run's process is gone")
    import ray

    from cluster.actors.remote import NAMESPACE

    ray.init(status.ray_address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.CRITICAL)
    try:
        return asyncio.run(_set(control_name(name), num_rollout_actors))
    finally:
        ray.shutdown()


async def _set(registered_as: str, num_rollout_actors: int) -> int:
    from cluster.actors.remote import find_actor, within

    control = find_actor(registered_as)
    before = await within(
        control.set_num_rollout_actors(num_rollout_actors),
        ANSWER_TIMEOUT_S,
        where=registered_as,
        waited_for="the run to accept the new number",
    )
    return int(before)
