"""Calls environments with a deadline and off the event loop, so that slow ones delay no others.

`async` methods run in the event loop, others in a thread. A thread that hangs is abandoned and replaced; run an
environment that may hang for good in a separate process (`process`).
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from cluster.errors import EnvironmentFault
from cluster.user_code import place_of
from rollout_actors.environments.protocol import Observation, Step, checked_start, checked_step, fault_of
from rollout_actors.environments.tools import Tools
from rollout_actors.tool_calls import ToolCall

NUM_THREADS = 4
Call = tuple[asyncio.AbstractEventLoop, "asyncio.Future[Any]", Callable[[], Any]]


class Host(Protocol):
    """One environment, in this process or another.

    After an EnvironmentFault of any method the host is unusable.
    """

    async def tools(self) -> list[dict[str, Any]]:
        """Return the JSON schemas of the functions that the policy may call."""

    async def reset(self, seed: int, columns: Mapping[str, Any]) -> Observation:
        """Start a conversation and return the first observation."""

    async def step(self, response: str, calls: Sequence[ToolCall] | None = None) -> Step:
        """Return the environment's answer to a response, or the results of its calls.

        Without `calls`, those in JSON are read in the response.
        """

    async def close(self) -> None:
        """Close the environment."""


class Threads:
    """A few daemon threads for calls that would block the event loop. Threads that hang are replaced."""

    def __init__(self, num: int = NUM_THREADS) -> None:
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._num = num
        self._num_started = 0

    def run(self, function: Callable[[], Any]) -> asyncio.Future[Any]:
        """Run the function in a thread. Returns a future of its result."""
        if self._num_started < self._num:
            self.start_another()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._calls.put((loop, future, function))
        return future

    def start_another(self) -> None:
        """Start another thread, such as in place of one that hangs."""
        self._num_started += 1
        threading.Thread(target=self._work, name="environments", daemon=True).start()

    def close(self) -> None:
        """End each thread as soon as it is idle."""
        for _ in range(self._num_started):
            self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            loop, future, function = call
            try:
                done = partial(_set_result, future, function())
            except BaseException as error:  # noqa: BLE001  the caller's future raises it
                done = partial(_set_exception, future, error)
            if not loop.is_closed():
                loop.call_soon_threadsafe(done)


def _set_result(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _set_exception(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))


class InProcessHost:
    """An environment in this process.

    Its methods are called in one of `threads`, or in the event loop if they are `async`.
    Raises EnvironmentFault if its tools lack type hints or documentation.
    """

    def __init__(self, environment: Any, threads: Threads, *, timeout_s: float) -> None:
        self._environment = environment
        self._threads = threads
        self._timeout_s = timeout_s
        offered = getattr(environment, "tools", None)
        try:
            self._tools = Tools(offered() if offered else ())
        except ValueError as error:
            raise EnvironmentFault(place_of(offered or type(environment)), f"tools: {error}") from error

    async def tools(self) -> list[dict[str, Any]]:
        """Return the JSON schemas of the functions that the policy may call."""
        return self._tools.schemas

    async def reset(self, seed: int, columns: Mapping[str, Any]) -> Observation:
        """Start a conversation and return the first observation."""
        method = self._environment.reset
        own = copy.deepcopy({name: value for name, value in columns.items() if name != "seed"})
        return checked_start(method, await self._run(method, seed=seed, **own))

    async def step(self, response: str, calls: Sequence[ToolCall] | None = None) -> Step:
        """Return the results of the response's tool calls, or the environment's answer without any."""
        calls = self._tools.calls(response) if calls is None else calls
        if calls:
            return await self._tools.results(calls, self._call_function)
        method = self._environment.step
        return checked_step(method, await self._run(method, response))

    async def _run(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        try:
            return await self._in_time(method, *args, **kwargs)
        except EnvironmentFault:
            raise
        except Exception as error:  # whatever the user's code raises is reported with its line
            raise fault_of(method, error) from error

    async def _call_function(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        try:
            return await self._in_time(function, **arguments)
        except (EnvironmentFault, ValueError, TypeError, KeyError):
            raise
        except Exception as error:  # whatever the user's code raises is reported with its line
            raise fault_of(function, error) from error

    async def _in_time(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Return the method's result. Raises what it raises, or EnvironmentFault if it exceeds the deadline."""
        is_async = inspect.iscoroutinefunction(method)
        try:
            async with asyncio.timeout(self._timeout_s) as deadline:
                if is_async:
                    return await method(*args, **kwargs)
                return await self._threads.run(partial(method, *args, **kwargs))
        except TimeoutError:
            if not deadline.expired():
                raise
            if not is_async:
                self._threads.start_another()
            what = f"{method.__name__} did not return within {self._timeout_s:g} s (environment.step_timeout_s)"
            raise EnvironmentFault(place_of(method), what) from None

    async def close(self) -> None:
        """Call the environment's `close`, if it has one."""
        close = getattr(self._environment, "close", None)
        if close is not None:
            await self._run(close)
