"""Publishes a new reward model to the reward services that serve a run.

While a service runs, RUN/serving/PORT.json holds its address.
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
    """Write the service's address while the context lasts; does nothing without a run directory."""
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
    """Publish the run's reward model to every service that serves the run; returns their ports.

    Forgets services whose Ray has ended. If a service refuses the model, raises its error after all were tried.
    """
    folder = published_folder(run_path)
    if folder is None:
        raise not_done("reward_model")
    published, errors = [], []
    for path in sorted((run_path / SERVING).glob("*.json")):
        service = json.loads(path.read_text())
        if not answers(service["ray_address"]):
            path.unlink(missing_ok=True)
            continue
        ray.init(service["ray_address"], namespace=NAMESPACE, log_to_driver=False, logging_level=logging.CRITICAL)
        try:
            publish_reward_model(service["name"], folder)
            published.append(int(path.stem))
        except AntiphonError as error:
            errors.append(type(error)(f"reward service on port {path.stem}", str(error)))
        finally:
            ray.shutdown()
    if errors:
        raise errors[0]
    return published
