from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster.errors import InputError
from deploy.runtime import services as serving
from deploy.runtime.services import announced, publish_to_services
from reward_service.scorers.files import weights_digest


class Published:
    """Replaces Ray and its services; records which Ray was joined and what was published."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.joined: list[str] = []
        self.taken: list[tuple[str, Path]] = []
        self.dead: set[str] = set()
        self.unwilling: set[str] = set()
        monkeypatch.setattr(serving, "answers", lambda address: address not in self.dead)
        monkeypatch.setattr("ray.init", lambda address, **options: self.joined.append(address))
        monkeypatch.setattr("ray.shutdown", lambda: self.joined.append("left"))
        monkeypatch.setattr(serving, "publish_reward_model", self.publish)

    def publish(self, name: str, folder: Path) -> None:
        if name in self.unwilling:
            raise InputError(name, "no such application runs on this Ray")
        self.taken.append((name, folder))


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Published:
    return Published(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder in which the run's reward model is archived."""
    (tmp_path / "reward_model").mkdir()
    (tmp_path / "reward_model" / "config.json").write_text("{}")
    (tmp_path / "reward_model" / "model.safetensors").write_text("weights")
    return tmp_path / "reward_models" / weights_digest(tmp_path / "reward_model")


@pytest.fixture
def announce(tmp_path: Path) -> Iterator[Callable[[int, str, str], None]]:
    """Announces a service by port, Ray address and name, until the end of the test."""
    with ExitStack() as services:
        yield lambda port, address, name: services.enter_context(
            announced(tmp_path, port=port, ray_address=address, name=name)
        )


def test_a_service_is_announced_while_it_runs(tmp_path: Path) -> None:
    with announced(tmp_path, port=8000, ray_address="here:1", name="run"):
        place = json.loads((tmp_path / "serving" / "8000.json").read_text())
        assert place == {"ray_address": "here:1", "name": "run"}
    assert list((tmp_path / "serving").iterdir()) == []


def test_nothing_is_announced_without_a_run_directory(tmp_path: Path) -> None:
    with announced(tmp_path / "none", port=8000, ray_address="here:1", name="run"):
        assert not (tmp_path / "none").exists()


def test_a_new_reward_model_is_published_to_every_running_service(
    tmp_path: Path, folder: Path, ray: Published, announce: Callable[[int, str, str], None]
) -> None:
    for port, address in ((8000, "here:1"), (8001, "gone:1"), (8002, "there:1")):
        announce(port, address, f"run-{port}")
    ray.dead = {"gone:1"}
    assert publish_to_services(tmp_path) == [8000, 8002]
    assert ray.taken == [("run-8000", folder), ("run-8002", folder)]
    assert ray.joined == ["here:1", "left", "there:1", "left"]
    assert [path.name for path in sorted((tmp_path / "serving").iterdir())] == ["8000.json", "8002.json"]


def test_a_service_that_refuses_it_is_named_after_all_were_tried(
    tmp_path: Path, folder: Path, ray: Published, announce: Callable[[int, str, str], None]
) -> None:
    for port in (8000, 8001):
        announce(port, "here:1", f"run-{port}")
    ray.unwilling = {"run-8000"}
    with pytest.raises(InputError, match="reward service on port 8000: run-8000: no such application"):
        publish_to_services(tmp_path)
    assert [name for name, _ in ray.taken] == ["run-8001"]
