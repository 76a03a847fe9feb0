"""Tests of the OpenEnv adapter, with our server and, if installed, with OpenEnv's."""

from __future__ import annotations

import asyncio
import importlib.util
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from cluster.errors import EnvironmentFault, InputError
from rollout_actors.adapters.openenv import OpenEnvText
from rollout_actors.config import EnvironmentConfig
from rollout_actors.environments.host import InProcessHost, Threads
from rollout_actors.environments.pool import EnvironmentPool, try_out
from tests.support.paths import ROOT

pytestmark = pytest.mark.process

pytest.importorskip("websockets", reason="the extra openenv is not installed")

PATH = "rollout_actors.adapters.openenv:OpenEnvText"


@pytest.fixture(scope="module", params=["contract", "openenv"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a server in a separate process."""
    if request.param == "openenv" and importlib.util.find_spec("openenv") is None:
        pytest.skip("the package openenv is not installed (it conflicts with vLLM)")
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.support.openenv_server", request.param, str(port)]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        _wait(process, port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(10)


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the server does not listen")


def number(seed: int, low: int = 1) -> int:
    return random.Random(seed).randint(low, 9)


async def hosted(url: str, **settings: object) -> InProcessHost:
    return InProcessHost(OpenEnvText(url, observation="word", action="", **settings), Threads(1), timeout_s=20)  # type: ignore[arg-type]


async def test_a_game_is_played_over_the_servers_session(url: str) -> None:
    host = await hosted(url, rules="a game")
    start = await host.reset(5, {})
    assert start == [{"role": "user", "content": "a game\nguess from 1 to 9"}]
    low = await host.step('{"guess": 0}')
    assert (low.observation, low.reward, low.terminated, low.info) == ("higher", 0.0, False, {})
    right = await host.step(f'{{"guess": {number(5)}}}')
    assert (right.observation, right.reward, right.terminated) == ("right", 1.0, True)
    assert right.info["step_count"] == 2.0
    await host.close()


async def test_reset_receives_columns_and_each_environment_has_its_own_session(url: str) -> None:
    first, second = await hosted(url), await hosted(url)
    assert await first.reset(1, {"low": 9}) == [{"role": "user", "content": "guess from 9 to 9"}]
    await second.reset(2, {"low": 3})
    assert (await first.step('{"guess": 9}')).terminated
    assert (await second.step(f'{{"guess": {number(2, 3)}}}')).terminated
    await asyncio.gather(first.close(), second.close())


async def test_a_response_that_is_not_an_action_gets_an_error(url: str) -> None:
    host = await hosted(url, malformed_reward=-0.5)
    await host.reset(5, {})
    for answer, reason in (
        ("four", "not JSON"),
        ("[4]", "not a JSON object"),
        ('{"number": 4}', "guess: Field required"),
    ):
        step = await host.step(answer)
        assert reason in str(step.observation)
        assert (step.reward, step.terminated, step.info) == (-0.5, False, {"malformed": 1.0})
    right = await host.step(f'{{"guess": {number(5)}}}')
    assert (right.terminated, right.info["step_count"]) == (True, 1.0)
    await host.close()


async def test_an_error_in_the_server_is_a_fault_naming_it(url: str) -> None:
    host = await hosted(url)
    await host.reset(5, {})
    with pytest.raises(EnvironmentFault, match=r"/ws: step: EXECUTION_ERROR: that guess breaks it"):
        await host.step('{"guess": 7777}')
    await host.close()


async def test_reset_can_be_repeated_in_this_process_and_in_another(url: str) -> None:
    settings = {"url": url, "observation": "word", "action": ""}
    for own_process in (False, True):
        await try_out(EnvironmentConfig(path=PATH, settings=settings, own_process=own_process), {})


async def test_the_next_conversation_works_after_a_cancelled_answer(url: str) -> None:
    environments = EnvironmentPool(
        EnvironmentConfig(path=PATH, settings={"url": url, "observation": "word", "action": ""})
    )
    step_sent = asyncio.Event()

    async def converse() -> None:
        async with environments.acquire() as host:
            await host.reset(5, {})
            step_sent.set()
            await host.step('{"guess": 0}')

    conversation = asyncio.ensure_future(converse())
    await step_sent.wait()
    conversation.cancel()
    await asyncio.gather(conversation, return_exceptions=True)
    async with environments.acquire() as host:
        assert await host.reset(5, {"low": 2}) == [{"role": "user", "content": "guess from 2 to 9"}]
    await environments.close()


async def test_the_error_names_a_bad_url_or_a_missing_server() -> None:
    with pytest.raises(InputError, match=r"settings\.url: 'nowhere' is not the URL of a server"):
        OpenEnvText("nowhere")
    with pytest.raises(EnvironmentFault, match=r"ws://127\.0\.0\.1:1/ws: cannot be reached"):
        await OpenEnvText("http://127.0.0.1:1/").reset(seed=0)


async def test_the_error_names_a_missing_observation_field(url: str) -> None:
    environment = OpenEnvText(url, observation="text")
    with pytest.raises(
        EnvironmentFault, match=r"settings\.observation: the observation has no field 'text'; it has .*word"
    ):
        await environment.reset(seed=0)
    await environment.close()
