"""The session that stages share, without Ray."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.actors.remote import within
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
        ("auto", {"torch_dtype": "bfloat16"}, "bfloat16"),
        ("float32", {"dtype": "float16"}, "float32"),
        ("auto", {}, "float32"),
        ("float32", {"dtype": "bfloat16"}, "float32"),
    ],
)
def test_the_dtype_is_the_setting_or_that_of_the_policys_folder(
    tmp_path: Path, dtype: str, folder: dict[str, str], expected: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(folder))
    config = RunConfig(model=ModelSection(path=tmp_path, dtype=dtype))  # type: ignore[arg-type]
    assert dtype_of(config, tmp_path) == expected


def test_float16_weights_are_refused_for_dtype_auto(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"dtype": "float16"}')
    with pytest.raises(InputError, match=r"model\.dtype: the weights of .* are float16"):
        dtype_of(RunConfig(model=ModelSection(path=tmp_path, dtype="auto")), tmp_path)


class Client:
    """A reward client that records its end."""

    is_closed = False

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Score | RewardError]:
        return []

    async def aclose(self) -> None:
        self.is_closed = True


def test_sessions_have_different_names_on_ray_unless_they_hold_the_lock(tmp_path: Path) -> None:
    config, run = RunConfig(), RunDirectory(tmp_path)
    names = [Session(config, run, View()).name for _ in range(2)]
    run.lock()
    names += [Session(config, run, View()).name for _ in range(2)]
    run.close()
    assert len(set(names)) == 3
    assert names[2] == names[3] == run.name_on_ray(config.run.name)


async def test_a_session_closes_its_reward_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client()
    config = RunConfig.model_validate({"model": {"path": "model"}, "reward_service": {"url": "http://elsewhere:1"}})
    session = Session(config, RunDirectory(tmp_path), View(), reward_client=lambda: RetryingRewardClient(client, 1.0))
    await session.rewards()
    assert not client.is_closed
    monkeypatch.setattr(
        "deploy.runtime.session.ray.is_initialized", lambda: False
    )  # other tests' Ray is not this one's
    await session.close()
    assert client.is_closed


async def test_a_cancelled_start_of_an_actor_leaves_no_unretrieved_exception(tmp_path: Path) -> None:
    class Actor:
        name = "rollout-0"

        async def start(self) -> None:
            started.set()
            await asyncio.Event().wait()

        async def preload(self, client: object) -> None:
            await asyncio.Event().wait()

    started, unretrieved = asyncio.Event(), list[dict[str, Any]]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unretrieved.append(context))
    config = RunConfig.model_validate({"model": {"path": "model"}})
    session = Session(config, RunDirectory(tmp_path), View(), reward_client=lambda: RetryingRewardClient(Client(), 1.0))
    actor: Any = Actor()
    starting = asyncio.create_task(within(session.start_engine(actor), 60, where="rollout-0", waited_for="its engine"))
    await started.wait()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    del starting
    gc.collect()
    await asyncio.sleep(0)
    assert unretrieved == []


@pytest.mark.parametrize("is_lost", [True, False])
async def test_a_command_ends_with_its_own_error_if_it_loses_its_port(is_lost: bool) -> None:
    lost, closed = InputError("reward_service.port", "cannot listen on 127.0.0.1:8000"), []

    async def follow_service() -> None:
        await (asyncio.sleep(0) if is_lost else asyncio.Event().wait())
        raise lost

    async def work() -> None:
        if is_lost:
            await asyncio.Event().wait()

    async def close() -> None:
        closed.append(True)

    run = SimpleNamespace(update_status=lambda **_: None, update_summary=lambda _: None)
    session = SimpleNamespace(connect=lambda: "", run=run, follow_service=follow_service, close=close)
    running = launch.in_session(session, work)  # type: ignore[arg-type]
    if is_lost:
        with pytest.raises(InputError) as caught:
            await running
        assert caught.value is lost
    else:
        await running
    assert closed == [True]


async def test_every_step_is_passed_to_the_callback(tmp_path: Path) -> None:
    steps: list[tuple[str, Mapping[str, Any]]] = []
    config = RunConfig.model_validate({"model": {"path": "model"}})
    session = Session(config, RunDirectory(tmp_path), View(), on_step=lambda stage, row: steps.append((stage, row)))
    session.log_step("sft", {"step": 1, "loss": 0.5})
    session.record("held_out", {"step": 1})
    assert steps == [("sft", {"step": 1, "loss": 0.5})]
