"""Runs an environment in a separate process, so that it can hang or crash without delaying others.

`python -m rollout_actors.environments.process` is that process. Both sides send one JSON object per line, so everything
that the environment receives and returns must be JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.errors import AntiphonError, EnvironmentFault
from rollout_actors.environments.host import InProcessHost, Threads
from rollout_actors.environments.protocol import PATH_KEY, Observation, Step, make_environment
from rollout_actors.tool_calls import ToolCall

MAX_LINE_BYTES = 2**26
START_TIMEOUT_S = 120.0


class SubprocessHost:
    """An environment in another process. It starts at the first call and ends at `close` or a fault."""

    def __init__(self, path: str, settings: Mapping[str, Any], *, timeout_s: float) -> None:
        self._begin = {"path": path, "settings": dict(settings), "timeout_s": timeout_s}
        self._path = path
        self._timeout_s = timeout_s
        self._process: asyncio.subprocess.Process | None = None

    async def tools(self) -> list[dict[str, Any]]:
        """Return the JSON schemas of the functions that the policy may call."""
        return list(await self._ask({"method": "tools"}))

    async def reset(self, seed: int, columns: Mapping[str, Any]) -> Observation:
        """Start a conversation and return the first observation."""
        start: Observation = await self._ask({"method": "reset", "seed": seed, "columns": dict(columns)})
        return start

    async def step(self, response: str, calls: Sequence[ToolCall] | None = None) -> Step:
        """Return the environment's answer to a response, or the results of its calls."""
        return Step(*await self._ask({"method": "step", "response": response, "calls": calls}))

    async def _ask(self, request: Mapping[str, Any]) -> Any:
        try:
            line = json.dumps(request)
        except TypeError as error:
            raise EnvironmentFault(
                self._path, f"with own_process = true, settings and columns must be JSON ({error})"
            ) from error
        if self._process is None:
            await self._start()
        answer = await self._exchange(line, self._timeout_s + 1.0)
        if "fault" in answer:
            await self.close()
            raise EnvironmentFault(*answer["fault"])
        return answer["value"]

    async def _start(self) -> None:
        pipe = asyncio.subprocess.PIPE
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "rollout_actors.environments.process"),
            stdin=pipe,
            stdout=pipe,
            env=environment,
            limit=MAX_LINE_BYTES,
        )
        answer = await self._exchange(json.dumps(self._begin), START_TIMEOUT_S)
        if "fault" in answer:
            await self.close()
            raise EnvironmentFault(*answer["fault"])

    async def _exchange(self, line: str, timeout_s: float) -> dict[str, Any]:
        """Send a line and return the answer.

        Raises EnvironmentFault if the process ends or misses the deadline.
        """
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                process.stdin.write(line.encode() + b"\n")
                await process.stdin.drain()
                answer = await process.stdout.readline()
        except (TimeoutError, OSError, ValueError) as error:
            await self.close()
            raise EnvironmentFault(self._path, f"its process did not answer within {timeout_s:g} s ({error})") from None
        if not answer:
            code = await process.wait()
            raise EnvironmentFault(self._path, f"its process ended (exit status {code})")
        return dict(json.loads(answer))

    async def close(self) -> None:
        """End the process."""
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]


async def serve() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the environment's prints go to stderr
    loop = asyncio.get_running_loop()
    host: InProcessHost | None = None
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        request = json.loads(line)
        try:
            if host is None:
                host = _make(request)
                value = None
            else:
                value = await _answer(host, request)
            text = json.dumps({"value": value})
        except AntiphonError as error:
            text = json.dumps({"fault": [error.where, error.what]})
        except (TypeError, ValueError) as error:
            text = json.dumps(
                {"fault": [PATH_KEY, f"with own_process = true, the environment must return JSON ({error})"]}
            )
        print(text, file=answers, flush=True)


def _make(begin: Mapping[str, Any]) -> InProcessHost:
    environment = make_environment(begin["path"], begin["settings"])
    return InProcessHost(environment, threads=Threads(1), timeout_s=begin["timeout_s"])


async def _answer(host: InProcessHost, request: Mapping[str, Any]) -> Any:
    match request["method"]:
        case "tools":
            return await host.tools()
        case "reset":
            return await host.reset(request["seed"], request["columns"])
        case _:
            calls = request["calls"]
            return await host.step(request["response"], None if calls is None else [ToolCall(*call) for call in calls])


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    asyncio.run(serve())
