"""Model folders shared by the tests of a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from rollout_actors import actor as rollout_actor
from tests.support.chat import write_chat_model
from tests.support.tiny import build_folder


@pytest.fixture(scope="session")
def tied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_folder(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def untied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_folder(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(params=["tied", "untied"])
def folder(request: pytest.FixtureRequest) -> Path:
    """A model with tied embeddings, then one without."""
    found: Path = request.getfixturevalue(f"{request.param}_folder")
    return found


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the last call for tickets of an actor that stops end soon."""
    monkeypatch.setattr(rollout_actor, "ADMIT_WAIT_S", 0.05)
