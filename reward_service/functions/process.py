"""Runs a user's function in a process of its own, in that process's main thread.

So it may use signals, call `asyncio.run`, hold the interpreter's lock or crash without harm to the service, and a call
that hangs is ended at its deadline. A sync function gets one call at a time; calls of an async one run concurrently.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from cluster import user_code
from cluster.errors import InputError
from cluster.scoring import ScoreRequest
from reward_service.functions.caller import late
from reward_service.functions.results import Result

START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from reward_service.functions.child import main; main()"
)
"""Program of a child: it has the modules of its parent, whatever the environment says."""
START_TIMEOUT_S = 300.0
GRACE_S = 5.0
"""How long an async function may exceed its deadline before its process is killed: its calls end themselves."""
MAX_DEATHS = 3
"""Processes that may end during one call before its items are errors."""


def check_path(path: str, key: str) -> None:
    """Raise InputError if the function can't be imported or called; imports it in a process that ends again."""
    FunctionProcess(path, key, timeout_s=START_TIMEOUT_S).close()


class ProcessEnded(Exception):
    """The function's process ended during a call."""


@dataclass(frozen=True)
class FunctionInfo:
    """What a function's process says of it: signature, digest of its source, place, whether it is async."""

    kind: str
    digest: str
    place: str
    is_async: bool


class FunctionProcess:
    """The process of the function at a dotted path; started at once, and again after it ended.

    `key` is the setting that names the function. Raises InputError if the function can't be imported or called.
    """

    def __init__(self, path: str, key: str, *, timeout_s: float) -> None:
        self._setup = {"path": path, "key": key, "timeout_s": timeout_s, "folders": user_code.folders()}
        self._timeout_s = timeout_s
        self._numbers = itertools.count()
        self._turn, self._starting, self._sending = asyncio.Lock(), asyncio.Lock(), asyncio.Lock()
        self._calls: set[asyncio.Future[list[Result]]] = set()
        self._child = _Child(self._setup)
        self.info = self._child.info

    async def results(self, requests: Sequence[ScoreRequest]) -> list[Result]:
        """Return one result per request. A call that was started is awaited even if the caller is cancelled."""
        call = asyncio.ensure_future(self._in_turn(requests))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return await asyncio.shield(call)

    def close(self) -> None:
        """Kill the process."""
        self._child.kill()

    async def _in_turn(self, requests: Sequence[ScoreRequest]) -> list[Result]:
        async with contextlib.nullcontext() if self.info.is_async else self._turn:
            for left in reversed(range(MAX_DEATHS)):
                try:
                    return await self._ask(requests)
                except ProcessEnded as error:
                    if not left:
                        return self._failed(requests, f"its process ended {MAX_DEATHS} times ({error})")
                except InputError as error:
                    return self._failed(requests, f"its process ended and can't be started again: {error}")
                except TimeoutError:
                    return self._failed(requests, late(self._timeout_s))
        raise AssertionError("unreachable")

    async def _ask(self, requests: Sequence[ScoreRequest]) -> list[Result]:
        """Return the answer of the process. Raises ProcessEnded, and TimeoutError after killing the process."""
        child, number = await self._running_child(), next(self._numbers)
        answer = child.expect(number)
        async with self._sending:
            await asyncio.to_thread(child.send, (number, [replace(each, prompt=str(each.prompt)) for each in requests]))
        try:
            limit_s = self._timeout_s + GRACE_S * self.info.is_async
            return [Result(**result) for result in await asyncio.wait_for(asyncio.wrap_future(answer), limit_s)]
        except TimeoutError:
            await asyncio.to_thread(child.kill)
            raise

    async def _running_child(self) -> _Child:
        """Return the process, a new one if it has ended. Raises InputError if its source has changed since."""
        async with self._starting:
            if self._child.has_ended():
                self._child = await asyncio.to_thread(_Child, self._setup)
            if self._child.info != self.info:
                what = f"the source of {self._setup['path']} has changed: repeat the command to use the new one"
                raise InputError(self.info.place, what)
            return self._child

    def _failed(self, requests: Sequence[ScoreRequest], error: str) -> list[Result]:
        return [Result(error=error, place=self.info.place, num_items=len(requests)) for _ in requests]


class _Child:
    """One process, its connection, and the answers that are awaited from it."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self._connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", START, str(theirs.fileno()), json.dumps(sys.path)],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env=_environment(),
            start_new_session=True,
        )
        theirs.close()
        self._expected: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()
        self._ended: str | None = None
        self._end = weakref.finalize(self, _kill, self._process, self._connection)
        try:
            self.info = self._first_answer(setup)
        except BaseException:
            self.kill()
            raise
        threading.Thread(target=_read, args=(self._connection, weakref.ref(self)), daemon=True).start()

    def _first_answer(self, setup: Mapping[str, Any]) -> FunctionInfo:
        path, key = setup["path"], setup["key"]
        try:
            self._connection.send(dict(setup))
            if not self._connection.poll(START_TIMEOUT_S):
                raise InputError(key, f"importing {path} took longer than {START_TIMEOUT_S:g} s")
            answer = json.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionError) as error:
            raise InputError(key, f"importing {path} ended its process ({self._exit()})") from error
        if "refused" in answer:
            raise InputError(*answer["refused"])
        return FunctionInfo(**answer)

    def has_ended(self) -> bool:
        """Return whether the process has ended."""
        return self._ended is not None

    def expect(self, number: int) -> Future[Any]:
        """Return the future of the answer to call `number`; its error is ProcessEnded if the process ends first."""
        answer: Future[Any] = Future()
        answer.set_running_or_notify_cancel()
        with self._lock:
            if self._ended is None:
                self._expected[number] = answer
            else:
                answer.set_exception(ProcessEnded(self._ended))
        return answer

    def send(self, message: Any) -> None:
        """Send a call. If the process has ended, its future says so."""
        with contextlib.suppress(ConnectionError, OSError):
            self._connection.send(message)

    def answered(self, message: Mapping[str, Any]) -> None:
        """Set the result of a call."""
        with self._lock:
            answer = self._expected.pop(message["number"], None)
        if answer is not None:
            answer.set_result(message["results"])

    def ended(self) -> None:
        """Raise ProcessEnded in all awaited calls."""
        with self._lock:
            self._ended = self._exit()
            answers, self._expected = list(self._expected.values()), {}
        for answer in answers:
            answer.set_exception(ProcessEnded(self._ended))

    def kill(self) -> None:
        """Kill the process and everything that it started in its session."""
        self._end()

    def _exit(self) -> str:
        try:
            code = self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _read(connection: Connection, owner: weakref.ref[_Child]) -> None:
    """Pass answers to their calls until the connection is closed."""
    while True:
        try:
            message = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            break
        child = owner()
        if child is not None:
            child.answered(message)
        del child
    child = owner()
    if child is not None:
        child.ended()


def _kill(process: subprocess.Popen[bytes], connection: Connection) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    connection.close()


def _environment() -> dict[str, str]:
    """Return the child's environment: this process's, a fixed order of sets, and its Ray cluster if any."""
    ray = sys.modules.get("ray")
    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address} if ray and ray.is_initialized() else {}
    return {"PYTHONHASHSEED": "0"} | os.environ | address
