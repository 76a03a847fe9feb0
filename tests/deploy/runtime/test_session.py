"""What the stages share and how they end, where no Ray is needed to tell."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.errors import InputError, RewardError
from cluster.scoring import Score, ScoreRequest
from deploy.config.schema import ModelSection, RunConfig
from deploy.run.directory import RunDirectory
from deploy.runtime.session import Session, dtype_of
from deploy.stages import launch
from deploy.terminal.view import View
from reward_service.client.retrying import RetryingRewardClient


@pytest.mark.parametrize(
    ("dtype", "folder", "expected"),
    [
        ("auto", {"dtype": "bfloat16"}, "bfloat16"),
        ("auto", {"torch_dtype": "float16"}, "float16"),
        ("auto", {}, "float32"),
        ("float32", {"dtype": "bfloat16"}, "float32"),
    ],
)
def test_engine_and_learner_compute_in_what_is_set_or_what_the_folder_says(
    tmp_path: Path, dtype: str, folder: dict[str, str], expected: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(folder))
    config = RunConfig(model=ModelSection(path=tmp_path, dtype=dtype))  # type: ignore[arg-type]
    assert dtype_of(config, tmp_path) == expected


class Client:
    """A reward client that says when it is closed."""

    is_closed = False

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Score | RewardError]:
        return []

    async def aclose(self) -> None:
        self.is_closed = True


async def test_a_session_closes_the_client_that_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client()
    config = RunConfig.model_validate({"model": {"path": "model"}, "reward_service": {"url": "http://elsewhere:1"}})
    monkeypatch.setattr(Session, "_new_reward_client", lambda _: RetryingRewardClient(client, 1.0))
    session = Session(config, RunDirectory(tmp_path), View())
    await session.rewards()
    assert not client.is_closed
    monkeypatch.setattr(
        "deploy.runtime.session.ray.is_initialized", lambda: False
    )  # other tests' Ray is not this one's
    await session.close()
    assert client.is_closed


@pytest.mark.parametrize("is_lost", [True, False])
async def test_a_run_that_has_lost_its_port_ends_with_the_error_that_says_so(
    is_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, closed = InputError("reward_service.port", "cannot listen on 127.0.0.1:8000"), []

    async def follow_service() -> None:
        await (asyncio.sleep(0) if is_lost else asyncio.Event().wait())
        raise lost

    async def stages(*_: object, **__: object) -> None:
        if is_lost:
            await asyncio.Event().wait()

    async def close() -> None:
        closed.append(True)

    run = SimpleNamespace(update_status=lambda **_: None, update_summary=lambda _: None)
    session = SimpleNamespace(connect=lambda: "", run=run, follow_service=follow_service, close=close)
    monkeypatch.setattr(launch, "_in_order", stages)
    running = launch._run(session, [], again=False)  # type: ignore[arg-type]
    if is_lost:
        with pytest.raises(InputError) as caught:
            await running
        assert caught.value is lost
    else:
        await running
    assert closed == [True]
