"""Which reward services stand for a run now, so that a new reward model can be published to them.

Each says where it is in RUN/serving/PORT.json while it runs. Knows nothing of how a service works.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from cluster.actors.remote import NAMESPACE
from cluster.errors import AntiphonError
from deploy.run.layout import SERVING
from deploy.run.reward_models import published_folder
from deploy.run.stages import not_done
from deploy.runtime.connect import answers
from reward_service.serving.application import publish_reward_model


@contextmanager
def announced(run_path: Path, *, port: int, ray_address: str, name: str) -> Iterator[None]:
    """Say where the service is while the block runs; nothing where there is no run directory."""
    if not run_path.is_dir():
        yield
        return
    path = run_path / SERVING / f"{port}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"ray_address": ray_address, "name": name}) + "\n")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def publish_to_services(run_path: Path) -> list[int]:
    """Publish the run's reward model to every service that stands for it; returns their ports.

    Forgets those whose Ray is gone. Raises the first error of those that could not take it, after all were asked.
    """
    folder = published_folder(run_path)
    if folder is None:
        raise not_done("reward_model")
    published, errors = [], []
    for path in sorted((run_path / SERVING).glob("*.json")):
        place = json.loads(path.read_text())
        if not answers(place["ray_address"]):
            path.unlink(missing_ok=True)
            continue
        ray.init(place["ray_address"], namespace=NAMESPACE, log_to_driver=False, logging_level=logging.CRITICAL)
        try:
            publish_reward_model(place["name"], folder)
            published.append(int(path.stem))
        except AntiphonError as error:
            errors.append(type(error)(f"reward service on port {path.stem}", str(error)))
        finally:
            ray.shutdown()
    if errors:
        raise errors[0]
    return published
