"""Tests of environments in this process and in others: results, checks, faults, tools."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import psutil
import pytest

from cluster.errors import EnvironmentFault, InputError
from rollout_actors.config import EnvironmentConfig
from rollout_actors.environments.host import Host, InProcessHost, Threads
from rollout_actors.environments.pool import EnvironmentPool
from rollout_actors.environments.process import SubprocessHost
from rollout_actors.environments.protocol import Step, checked_start, make_environment, numbers
from rollout_actors.environments.tools import Tools
from rollout_actors.tool_calls import ToolCall
from tests.support import environments

HERE = "tests.support.environments"


@asynccontextmanager
async def host(
    name: str, *, own_process: bool = False, timeout_s: float = 20.0, **settings: Any
) -> AsyncIterator[Host]:
    path = f"{HERE}:{name}"
    hosted: Host
    if own_process:
        hosted = SubprocessHost(path, settings, timeout_s=timeout_s)
    else:
        hosted = InProcessHost(make_environment(path, settings), Threads(1), timeout_s=timeout_s)
    try:
        yield hosted
    finally:
        await hosted.close()


@pytest.mark.process
@pytest.mark.parametrize("own_process", [False, True])
@pytest.mark.parametrize("name", ["Echo", "AsyncEcho"])
async def test_conversations_are_equal_in_both_hosts_and_repeatable(name: str, own_process: bool) -> None:
    async with host(name, own_process=own_process) as hosted:
        for _ in range(2):
            start = await hosted.reset(5, {"word": "x"})
            steps = [await hosted.step("ab"), await hosted.step("abc")]
            assert [dict(message) for message in start if isinstance(message, dict)] == list(start)
            assert steps == [
                Step("1ok", 2.0, False, False, {"answers": 1.0}),
                Step("2ok", 3.0, True, False, {"answers": 2.0}),
            ]


async def test_a_message_with_calls_needs_no_content() -> None:
    calling = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    for message in (calling, calling | {"content": None}):
        assert checked_start(environments.Echo().reset, [message]) == [calling | {"content": ""}]
    with pytest.raises(EnvironmentFault, match="reset must return messages or a text"):
        checked_start(environments.Echo().reset, [{"role": "assistant", "content": None}])


async def test_environment_changes_only_its_own_copy_of_the_columns() -> None:
    class Consuming:
        def reset(self, *, seed: int, board: list[int], **columns: Any) -> str:
            return f"{seed} {board.pop()}"

        def step(self, response: str) -> Any: ...

    columns, hosted = {"board": [1, 2], "seed": 9}, InProcessHost(Consuming(), Threads(1), timeout_s=20.0)
    for _ in range(2):
        assert await hosted.reset(5, columns) == "5 2"
    assert columns["board"] == [1, 2]
    await hosted.close()


async def test_numpy_values_are_converted_and_texts_in_info_dropped() -> None:
    async with host("Odd", how="gymnasium's") as hosted:
        await hosted.reset(0, {})
        assert await hosted.step("a") == Step("a", 0.5, True, False, {"x": 2.0})


BROKEN = {
    "four values": "step must return (observation, reward, terminated, truncated, info), not ('a', 1.0, True, False)",
    "no reward": "step must return a finite reward, not None",
    "not finite": "step must return a finite reward, not nan",
    "no flag": "step must return terminated to be true or false, not 'yes'",
    "no info": "step must return info to be a mapping, not None",
    "no observation": "step must return an observation of messages or a text, not 7",
}


@pytest.mark.parametrize("how", BROKEN)
async def test_the_fault_has_file_and_line_of_a_step_that_breaks_the_protocol(how: str) -> None:
    async with host("Odd", how=how) as hosted:
        await hosted.reset(0, {})
        with pytest.raises(EnvironmentFault) as fault:
            await hosted.step("a")
    line = inspect.getsourcelines(environments.Odd.step)[1]
    assert str(fault.value) == f"tests/support/environments.py:{line}: {BROKEN[how]}"


@pytest.mark.parametrize(
    ("how", "shown"),
    [("reset nothing", "None"), ("reset empty", "[]"), ("reset no role", "[{'content': 'a'}]"), ("reset text", "''")],
)
async def test_the_fault_names_a_reset_that_breaks_the_protocol(how: str, shown: str) -> None:
    async with host("Odd", how=how) as hosted:
        with pytest.raises(
            EnvironmentFault, match=r"environments\.py:\d+: reset must return messages or a text, not "
        ) as fault:
            await hosted.reset(0, {})
    assert fault.value.what.endswith(shown)


@pytest.mark.process
@pytest.mark.parametrize("own_process", [False, True])
async def test_the_fault_has_the_line_that_raised_an_exception(own_process: bool) -> None:
    async with host("Odd", own_process=own_process, how="raises") as hosted:
        await hosted.reset(0, {})
        with pytest.raises(EnvironmentFault) as fault:
            await hosted.step("a")
    source, first = inspect.getsourcelines(environments.Odd.step)
    line = first + next(i for i, text in enumerate(source) if "no luck" in text)
    assert str(fault.value) == f"tests/support/environments.py:{line}: step raised RuntimeError: no luck"


@pytest.mark.process
@pytest.mark.parametrize("own_process", [False, True])
async def test_a_hanging_environment_is_abandoned_and_delays_no_other(own_process: bool) -> None:
    threads = Threads(1)
    hanging: Host = InProcessHost(make_environment(f"{HERE}:Odd", {"how": "hangs"}), threads, timeout_s=0.2)
    if own_process:
        hanging = SubprocessHost(f"{HERE}:Odd", {"how": "hangs"}, timeout_s=0.2)
    other = InProcessHost(make_environment(f"{HERE}:Echo", {}), threads, timeout_s=20)
    await hanging.reset(0, {})
    started = time.monotonic()
    with pytest.raises(EnvironmentFault, match=r"step did not return within 0\.2 s"):
        await hanging.step("a")
    await other.reset(0, {})
    assert (await other.step("ab")).reward == 2.0
    assert time.monotonic() - started < 15
    await hanging.close()


@pytest.mark.process
async def test_a_process_that_exits_is_a_fault_but_printing_is_not() -> None:
    async with host("Odd", own_process=True, how="crashes") as hosted:
        await hosted.reset(0, {})
        with pytest.raises(EnvironmentFault, match=r"its process ended \(exit status 7\)"):
            await hosted.step("a")
    async with host("Odd", own_process=True, how="prints") as hosted:
        await hosted.reset(0, {})
        assert (await hosted.step("abc")).reward == 3.0


@pytest.mark.process
async def test_closing_the_host_ends_its_process() -> None:
    before = set(psutil.Process().children())
    async with host("Echo", own_process=True) as hosted:
        await hosted.reset(0, {})
        assert len(set(psutil.Process().children()) - before) == 1
    assert not set(psutil.Process().children()) - before


async def test_columns_that_are_not_json_are_a_fault_in_another_process() -> None:
    async with host("Echo", own_process=True) as hosted:
        with pytest.raises(EnvironmentFault, match="settings and columns must be JSON"):
            await hosted.reset(0, {"word": object()})


def test_the_error_names_an_environment_that_cannot_be_make_environment() -> None:
    with pytest.raises(EnvironmentFault, match=r"environments\.py:\d+: has no method step"):
        make_environment(f"{HERE}:NoStep", {})
    with pytest.raises(EnvironmentFault, match=r"environments\.py:\d+: .*unexpected keyword argument 'other'"):
        make_environment(f"{HERE}:refuses_its_settings", {"other": 1})
    with pytest.raises(InputError, match=r"environment\.path: .* has no function 'Nothing'"):
        make_environment(f"{HERE}:Nothing", {})
    with pytest.raises(EnvironmentFault, match=r"environments\.py:\d+: tools: "):
        InProcessHost(environments.BadTools(), Threads(1), timeout_s=1)


@pytest.mark.process
@pytest.mark.parametrize("own_process", [False, True])
async def test_an_environment_is_not_reused_after_a_cancelled_conversation(own_process: bool) -> None:
    config = EnvironmentConfig(path=f"{HERE}:Odd", settings={"how": "dawdles"}, own_process=own_process)
    pool, step_sent = EnvironmentPool(config), asyncio.Event()

    async def converse() -> None:
        async with pool.acquire() as host:
            await host.reset(1, {})
            step_sent.set()
            await host.step("its answer must not reach the next conversation")

    conversation = asyncio.ensure_future(converse())
    await step_sent.wait()
    await asyncio.sleep(0.1)
    conversation.cancel()
    assert isinstance((await asyncio.gather(conversation, return_exceptions=True))[0], asyncio.CancelledError)
    async with pool.acquire() as host:
        assert isinstance(await host.reset(1, {}), list)
        assert (await host.step("a")).observation == "1ok"
    await pool.close()


async def test_environments_are_reused_except_after_a_fault() -> None:
    pool = EnvironmentPool(EnvironmentConfig(path=f"{HERE}:Echo"))
    async with pool.acquire() as first:
        async with pool.acquire() as second:
            assert first is not second
    async with pool.acquire() as again:
        assert again is first
        with pytest.raises(EnvironmentFault, match="broken"):  # noqa: PT012
            async with pool.acquire() as other:
                assert other is second
                raise EnvironmentFault("here", "broken")
        async with pool.acquire() as third:
            assert third not in (first, second)
    await pool.close()


# Tests of tools.


def call(name: str, **arguments: Any) -> str:
    import json

    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.mark.process
@pytest.mark.parametrize("own_process", [False, True])
async def test_a_tool_call_gets_its_result_without_a_step(own_process: bool) -> None:
    async with host("Adder", own_process=own_process) as hosted:
        await hosted.reset(0, {})
        step = await hosted.step("so " + call("add", first=2, second=3) + call("add", first=1, second=1))
        results = [
            {"role": "tool", "name": "add", "tool_call_id": f"call0000{number}", "content": content}
            for number, content in enumerate("52")
        ]
        assert step == Step(results, 0.0, False, False, {})
        assert (await hosted.step("given", [ToolCall("add", {"first": 1, "second": 0})])).observation == [
            {"role": "tool", "name": "add", "tool_call_id": "call00000", "content": "1"}
        ]
        assert (await hosted.step(call("add", first=2, second=3), [])).info == {"answers": 1.0}, "no call was read"
        thinking = "<think>" + call("explode") + "</think>"
        assert (await hosted.step(thinking)).info == {"answers": 2.0}
        assert [schema["function"]["name"] for schema in await hosted.tools()] == ["add", "fail", "explode"]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ('{"name": "add", "parameters": {"first": 2, "second": 2}}', "4"),
        (call("subtract"), "error: no function 'subtract'; the functions are add, fail, explode"),
        (call("add", first=1), "error: missing a required argument: 'second'"),
        ("<tool_call>add(1, 2)</tool_call>", "error: the call is not JSON"),
        ('<tool_call>{"name": 1}</tool_call>', 'error: a call must be {"name": ..., "arguments": {...}}'),
        ('<tool_call>{"name": "add", "arguments": 3}', "error: arguments must be an object"),
        (call("fail", why="not today"), "error: ValueError: not today"),
    ],
)
async def test_other_forms_and_malformed_calls_become_observations(response: str, expected: str) -> None:
    async with host("Adder") as hosted:
        await hosted.reset(0, {})
        (message,) = list((await hosted.step(response)).observation)
        assert isinstance(message, dict)
        assert message["content"].startswith(expected)


def look(word: str) -> dict[str, str]:
    """Look up a word.

    Args:
        word: the word
    """
    return {word: "naïve 你好"}


async def test_results_of_functions_keep_their_characters() -> None:
    async def run(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        return function(**arguments)

    step = await Tools([look]).results([ToolCall("look", {"word": "é"})], run)
    assert [message["content"] for message in step.observation if isinstance(message, dict)] == ['{"é": "naïve 你好"}']


async def test_an_exception_in_a_tool_is_the_environments_fault() -> None:
    async with host("Adder") as hosted:
        await hosted.reset(0, {})
        with pytest.raises(EnvironmentFault, match=r"environments\.py:\d+: explode raised RuntimeError: boom"):
            await hosted.step(call("explode"))


async def test_all_environments_get_answers_from_few_threads() -> None:
    threads = Threads(2)
    hosts = [InProcessHost(environments.Echo(), threads, timeout_s=20) for _ in range(50)]
    await asyncio.gather(*(hosted.reset(0, {}) for hosted in hosts))
    steps = await asyncio.gather(*(hosted.step("a" * i) for i, hosted in enumerate(hosts)))
    assert [step.reward for step in steps] == [float(i) for i in range(50)]


def test_names_in_info_hold_no_lone_surrogate() -> None:
    assert numbers({"file \udce9": 1, "n": 2.0, "text": "x"}) == {"file \ufffd": 1.0, "n": 2.0}
