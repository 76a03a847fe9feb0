"""Environments behind their hosts, here and in processes of their own: what is given, checked and named."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psutil
import pytest

from cluster.errors import EnvironmentFault, InputError
from rollout_actors.config import EnvironmentConfig
from rollout_actors.environments.host import Host, HostedHere, Threads
from rollout_actors.environments.pool import Environments
from rollout_actors.environments.process import HostedApart
from rollout_actors.environments.protocol import Step, made
from tests.support import environments as worlds

HERE = "tests.support.environments"


@asynccontextmanager
async def host(name: str, *, apart: bool = False, timeout_s: float = 20.0, **settings: Any) -> AsyncIterator[Host]:
    path = f"{HERE}:{name}"
    hosted: Host
    if apart:
        hosted = HostedApart(path, settings, timeout_s=timeout_s)
    else:
        hosted = HostedHere(made(path, settings), Threads(1), timeout_s=timeout_s)
    try:
        yield hosted
    finally:
        await hosted.close()


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", ["Echo", "AsyncEcho"])
async def test_a_conversation_is_the_same_here_and_apart_and_begins_anew_with_the_same_seed(
    name: str, apart: bool
) -> None:
    async with host(name, apart=apart) as hosted:
        for _ in range(2):
            start = await hosted.reset(5, {"word": "x"})
            steps = [await hosted.step("ab"), await hosted.step("abc")]
            assert [dict(message) for message in start if isinstance(message, dict)] == list(start)
            assert steps == [
                Step("1ok", 2.0, False, False, {"answers": 1.0}),
                Step("2ok", 3.0, True, False, {"answers": 2.0}),
            ]


async def test_numbers_and_flags_of_numpy_are_taken_and_words_in_info_left_out() -> None:
    async with host("Odd", how="gymnasium's") as hosted:
        await hosted.reset(0, {})
        assert await hosted.step("a") == Step("a", 0.5, True, False, {"x": 2.0})


BROKEN = {
    "four values": "step must give (observation, reward, terminated, truncated, info), not ('a', 1.0, True, False)",
    "no reward": "step must give a finite reward, not None",
    "not finite": "step must give a finite reward, not nan",
    "no flag": "step must give terminated to be true or false, not 'yes'",
    "no info": "step must give info to be a mapping, not None",
    "no observation": "step must give an observation of messages or a text, not 7",
}


@pytest.mark.parametrize("how", BROKEN)
async def test_a_step_that_breaks_the_protocol_is_named_with_file_and_line(how: str) -> None:
    async with host("Odd", how=how) as hosted:
        await hosted.reset(0, {})
        with pytest.raises(EnvironmentFault) as fault:
            await hosted.step("a")
    line = inspect.getsourcelines(worlds.Odd.step)[1]
    assert str(fault.value) == f"tests/support/environments.py:{line}: {BROKEN[how]}"


@pytest.mark.parametrize(
    ("how", "shown"),
    [("reset nothing", "None"), ("reset empty", "[]"), ("reset no role", "[{'content': 'a'}]"), ("reset text", "''")],
)
async def test_a_reset_that_breaks_the_protocol_is_named(how: str, shown: str) -> None:
    async with host("Odd", how=how) as hosted:
        with pytest.raises(
            EnvironmentFault, match=r"environments\.py:\d+: reset must give messages or a text, not "
        ) as fault:
            await hosted.reset(0, {})
    assert fault.value.what.endswith(shown)


@pytest.mark.parametrize("apart", [False, True])
async def test_what_an_environment_raises_is_named_with_the_line_that_raised_it(apart: bool) -> None:
    async with host("Odd", apart=apart, how="raises") as hosted:
        await hosted.reset(0, {})
        with pytest.raises(EnvironmentFault) as fault:
            await hosted.step("a")
    source, first = inspect.getsourcelines(worlds.Odd.step)
    line = first + next(i for i, text in enumerate(source) if "no luck" in text)
    assert str(fault.value) == f"tests/support/environments.py:{line}: step raised RuntimeError: no luck"


@pytest.mark.parametrize("apart", [False, True])
async def test_one_that_hangs_is_given_up_at_its_deadline_and_holds_up_nobody(apart: bool) -> None:
    threads = Threads(1)
    hanging: Host = HostedHere(made(f"{HERE}:Odd", {"how": "hangs"}), threads, timeout_s=0.2)
    if apart:
        hanging = HostedApart(f"{HERE}:Odd", {"how": "hangs"}, timeout_s=0.2)
    other = HostedHere(made(f"{HERE}:Echo", {}), threads, timeout_s=20)
    await hanging.reset(0, {})
    started = time.monotonic()
    with pytest.raises(EnvironmentFault, match=r"step did not come back within 0\.2 s"):
        await hanging.step("a")
    await other.reset(0, {})
    assert (await other.step("ab")).reward == 2.0
    assert time.monotonic() - started < 15
    await hanging.close()


async def test_a_process_that_ends_is_a_fault_and_one_that_prints_is_none() -> None:
    async with host("Odd", apart=True, how="crashes") as hosted:
        await hosted.reset(0, {})
        with pytest.raises(EnvironmentFault, match=r"its process ended \(exit status 7\)"):
            await hosted.step("a")
    async with host("Odd", apart=True, how="prints") as hosted:
        await hosted.reset(0, {})
        assert (await hosted.step("abc")).reward == 3.0


async def test_a_process_ends_with_its_host() -> None:
    before = set(psutil.Process().children())
    async with host("Echo", apart=True) as hosted:
        await hosted.reset(0, {})
        assert len(set(psutil.Process().children()) - before) == 1
    assert not set(psutil.Process().children()) - before


async def test_what_is_no_json_does_not_travel() -> None:
    async with host("Echo", apart=True) as hosted:
        with pytest.raises(EnvironmentFault, match="it is given JSON alone"):
            await hosted.reset(0, {"word": object()})


def test_what_is_no_environment_or_refuses_its_settings_is_named() -> None:
    with pytest.raises(EnvironmentFault, match=r"environments\.py:\d+: has no method step"):
        made(f"{HERE}:NoStep", {})
    with pytest.raises(EnvironmentFault, match=r"environments\.py:\d+: .*unexpected keyword argument 'other'"):
        made(f"{HERE}:refuses_its_settings", {"other": 1})
    with pytest.raises(InputError, match=r"environment\.path: .* has no function 'Nothing'"):
        made(f"{HERE}:Nothing", {})
    with pytest.raises(EnvironmentFault, match=r"environments\.py:\d+: tools: "):
        HostedHere(worlds.BadTools(), Threads(1), timeout_s=1)


@pytest.mark.parametrize("apart", [False, True])
async def test_one_whose_conversation_is_given_up_while_it_answers_is_not_used_again(apart: bool) -> None:
    config = EnvironmentConfig(path=f"{HERE}:Odd", settings={"how": "dawdles"}, own_process=apart)
    environments, is_asked = Environments(config), asyncio.Event()

    async def hold() -> None:
        async with environments.one() as host:
            await host.reset(1, {})
            is_asked.set()
            await host.step("what the next one must not be told of")

    held = asyncio.ensure_future(hold())
    await is_asked.wait()
    await asyncio.sleep(0.1)
    held.cancel()
    assert isinstance((await asyncio.gather(held, return_exceptions=True))[0], asyncio.CancelledError)
    async with environments.one() as host:
        assert isinstance(await host.reset(1, {}), list)
        assert (await host.step("a")).observation == "1ok"
    await environments.close()


async def test_environments_are_used_again_but_for_those_at_fault() -> None:
    environments = Environments(EnvironmentConfig(path=f"{HERE}:Echo"))
    async with environments.one() as first:
        async with environments.one() as second:
            assert first is not second
    async with environments.one() as again:
        assert again is first
        with pytest.raises(EnvironmentFault, match="broken"):  # noqa: PT012
            async with environments.one() as other:
                assert other is second
                raise EnvironmentFault("here", "broken")
        async with environments.one() as third:
            assert third not in (first, second)
    await environments.close()


# Tools.


def call(name: str, **arguments: Any) -> str:
    import json

    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.mark.parametrize("apart", [False, True])
async def test_a_call_is_answered_with_its_result_and_the_environment_is_not_asked(apart: bool) -> None:
    async with host("Adder", apart=apart) as hosted:
        await hosted.reset(0, {})
        step = await hosted.step("so " + call("add", first=2, second=3) + call("add", first=1, second=1))
        assert step == Step([{"role": "tool", "content": "5"}, {"role": "tool", "content": "2"}], 0.0, False, False, {})
        assert (await hosted.step("plain")).info == {"answers": 1.0}
        assert [schema["function"]["name"] for schema in await hosted.tools()] == ["add", "fail", "explode"]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ('{"name": "add", "parameters": {"first": 2, "second": 2}}', "4"),
        (call("subtract"), "error: no function 'subtract'; there are add, fail, explode"),
        (call("add", first=1), "error: missing a required argument: 'second'"),
        ("<tool_call>add(1, 2)</tool_call>", "error: the call is no JSON"),
        ('<tool_call>{"name": 1}</tool_call>', 'error: a call is {"name": ..., "arguments": {...}}'),
        ('<tool_call>{"name": "add", "arguments": 3}', "error: arguments must be an object"),
        (call("fail", why="not today"), "error: ValueError: not today"),
    ],
)
async def test_a_call_in_another_form_or_a_malformed_one_is_an_observation_too(response: str, expected: str) -> None:
    async with host("Adder") as hosted:
        await hosted.reset(0, {})
        (message,) = (await hosted.step(response)).observation
        assert isinstance(message, dict)
        assert message["content"].startswith(expected)


async def test_a_function_that_breaks_is_the_environments_fault() -> None:
    async with host("Adder") as hosted:
        await hosted.reset(0, {})
        with pytest.raises(EnvironmentFault, match=r"environments\.py:\d+: explode raised RuntimeError: boom"):
            await hosted.step(call("explode"))


async def test_many_wait_for_few_threads_and_all_are_answered() -> None:
    threads = Threads(2)
    hosts = [HostedHere(worlds.Echo(), threads, timeout_s=20) for _ in range(50)]
    await asyncio.gather(*(hosted.reset(0, {}) for hosted in hosts))
    steps = await asyncio.gather(*(hosted.step("a" * i) for i, hosted in enumerate(hosts)))
    assert [step.reward for step in steps] == [float(i) for i in range(50)]
