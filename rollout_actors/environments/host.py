"""Calls environments so that none can hold up the others: each call has a deadline, off the event loop.

An `async` method runs in the event loop, a plain one in a thread. A thread that hangs is left behind and another takes
its place; an environment that may hang for good belongs in a process of its own (`environment_process`). Knows neither
tokens nor conversations.
"""

from __future__ import annotations

import asyncio
import inspect
import queue
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from cluster.errors import EnvironmentFault
from cluster.user_code import place_of
from rollout_actors.environments.protocol import Observation, Step, checked_start, checked_step, raised
from rollout_actors.environments.tools import Tools

NUM_THREADS = 4
Call = tuple[asyncio.AbstractEventLoop, "asyncio.Future[Any]", Callable[[], Any]]


class Host(Protocol):
    """One environment, wherever it runs. All methods raise EnvironmentFault; after one, the host is of no more use."""

    async def tools(self) -> list[dict[str, Any]]:
        """JSON schemas of the functions that the policy may call."""

    async def reset(self, seed: int, columns: Mapping[str, Any]) -> Observation:
        """Begin a conversation."""

    async def step(self, response: str) -> Step:
        """Answer a response."""

    async def close(self) -> None:
        """Give back what it holds."""


class Threads:
    """A few daemon threads that run what must not be run in the event loop; one that hangs is replaced."""

    def __init__(self, num: int = NUM_THREADS) -> None:
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._num = num
        self._num_started = 0

    def run(self, function: Callable[[], Any]) -> asyncio.Future[Any]:
        """The result of the function, or what it raised."""
        if self._num_started < self._num:
            self.start_another()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._calls.put((loop, future, function))
        return future

    def start_another(self) -> None:
        """One thread more: the first ones, and in place of one that hangs."""
        self._num_started += 1
        threading.Thread(target=self._work, name="environments", daemon=True).start()

    def close(self) -> None:
        """End the threads when they come back."""
        for _ in range(self._num_started):
            self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            loop, future, function = call
            try:
                done = partial(_set_result, future, function())
            except BaseException as error:  # noqa: BLE001  whatever it is, the one who waits is told
                done = partial(_set_exception, future, error)
            if not loop.is_closed():
                loop.call_soon_threadsafe(done)


def _set_result(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _set_exception(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))


class HostedHere:
    """An environment in this process, called in one of `threads` or, where its methods are `async`, in the loop.

    Raises EnvironmentFault where its tools are not documented.
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
        """JSON schemas of the functions that the policy may call."""
        return self._tools.schemas

    async def reset(self, seed: int, columns: Mapping[str, Any]) -> Observation:
        """Begin a conversation."""
        method = self._environment.reset
        return checked_start(method, await self._run(method, seed=seed, **columns))

    async def step(self, response: str) -> Step:
        """Answer a response: with the results of its calls, or else by the environment."""
        calls = self._tools.calls(response)
        if calls:
            return await self._tools.results(calls, self._call_function)
        method = self._environment.step
        return checked_step(method, await self._run(method, response))

    async def _run(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return await self._in_time(method, *args, **kwargs)
        except EnvironmentFault:
            raise
        except Exception as error:
            raise raised(method, error) from error

    async def _call_function(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        try:
            return await self._in_time(function, **arguments)
        except (EnvironmentFault, ValueError, TypeError, KeyError):
            raise
        except Exception as error:
            raise raised(function, error) from error

    async def _in_time(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Its result, or what it raised. Raises EnvironmentFault where it does not come back in time."""
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
            what = f"{method.__name__} did not come back within {self._timeout_s:g} s (environment.step_timeout_s)"
            raise EnvironmentFault(place_of(method), what) from None

    async def close(self) -> None:
        """Have the environment close, where it can."""
        close = getattr(self._environment, "close", None)
        if close is not None:
            await self._run(close)
