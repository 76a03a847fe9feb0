"""An environment in a process of its own: it may be heavy, hang or crash, and holds up nobody.

`python -m rollout_actors.environments.process` is that process. One JSON object a line goes in and out, so what an
environment is given and gives must be JSON. Knows neither tokens nor conversations.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

from cluster.errors import AntiphonError, EnvironmentFault
from rollout_actors.environments.host import HostedHere, Threads
from rollout_actors.environments.protocol import PATH_KEY, Observation, Step, made

MAX_LINE_BYTES = 2**26
START_TIMEOUT_S = 120.0


class HostedApart:
    """An environment in a process that this one starts with the first call and ends with `close`, or at a fault."""

    def __init__(self, path: str, settings: Mapping[str, Any], *, timeout_s: float) -> None:
        self._begin = {"path": path, "settings": dict(settings), "timeout_s": timeout_s}
        self._path = path
        self._timeout_s = timeout_s
        self._process: asyncio.subprocess.Process | None = None

    async def tools(self) -> list[dict[str, Any]]:
        """JSON schemas of the functions that the policy may call."""
        return list(await self._ask({"method": "tools"}))

    async def reset(self, seed: int, columns: Mapping[str, Any]) -> Observation:
        """Begin a conversation."""
        start: Observation = await self._ask({"method": "reset", "seed": seed, "columns": dict(columns)})
        return start

    async def step(self, response: str) -> Step:
        """Answer a response."""
        return Step(*await self._ask({"method": "step", "response": response}))

    async def _ask(self, question: Mapping[str, Any]) -> Any:
        try:
            line = json.dumps(question)
        except TypeError as error:
            raise EnvironmentFault(self._path, f"in a process of its own it is given JSON alone ({error})") from error
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
        """One line there and one back. Raises EnvironmentFault where the process ends or does not answer in time."""
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
    """Answer one question after another until there is no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the environment prints is no answer
    loop = asyncio.get_running_loop()
    host: HostedHere | None = None
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        question = json.loads(line)
        try:
            if host is None:
                host = _make(question)
                value = None
            else:
                value = await _answered(host, question)
            text = json.dumps({"value": value})
        except AntiphonError as error:
            text = json.dumps({"fault": [error.where, error.what]})
        except (TypeError, ValueError) as error:
            text = json.dumps({"fault": [PATH_KEY, f"in a process of its own it must give JSON alone ({error})"]})
        print(text, file=answers, flush=True)


def _make(begin: Mapping[str, Any]) -> HostedHere:
    return HostedHere(made(begin["path"], begin["settings"]), threads=Threads(1), timeout_s=begin["timeout_s"])


async def _answered(host: HostedHere, question: Mapping[str, Any]) -> Any:
    match question["method"]:
        case "tools":
            return await host.tools()
        case "reset":
            return await host.reset(question["seed"], question["columns"])
        case _:
            return await host.step(question["response"])


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is its parent's affair, which ends it
    asyncio.run(serve())
