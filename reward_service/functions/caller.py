"""Runs a user's function on requests, and turns whatever it does into one result per item.

Nothing that the function raises gets out: it becomes the error of the items of that call.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from cluster.scoring import ScoreRequest
from cluster.user_code import line_that_raised, place_of
from reward_service.functions.results import (
    Result,
    Returned,
    SignatureMismatch,
    from_openrlhf,
    from_verl,
    from_verl_batch,
    listed,
    result_of,
    with_logs,
)
from reward_service.functions.signatures import Call, CallBuilder

MAX_TRACEBACKS = 20
"""Tracebacks that a process prints; further errors are in the results only."""


class FunctionCaller:
    """Calls a function in its signature. A class with `__call__` is instantiated without arguments first.

    Raises SignatureMismatch if it can't be called.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        target: Any = function
        self._function = _instance(target) if inspect.isclass(target) else target
        self._builder = CallBuilder(self._function)
        self.kind = self._builder.kind
        self.place = place_of(function)
        self.is_async = any(map(inspect.iscoroutinefunction, (self._function, self._function.__call__)))
        self._num_printed = 0

    def results(self, requests: Sequence[ScoreRequest]) -> list[Result]:
        """Return one result per request; blocks. An async function runs in an event loop of its own."""
        results: dict[int, Result] = {}
        for call in self._calls(requests, results):
            try:
                value = self._function(*call.positional, **call.named)
                if inspect.isawaitable(value):
                    value = asyncio.run(_awaited(value))
            except Exception as error:  # noqa: BLE001 boundary to a user's function: what it raises is its items' result
                self._store(call, self._raised(error, call), results)
            else:
                self._store(call, self._read(value, call), results)
        return [results[position] for position in range(len(requests))]

    async def results_async(self, requests: Sequence[ScoreRequest], *, timeout_s: float) -> list[Result]:
        """Return one result per request of an async function; its calls run concurrently."""
        results: dict[int, Result] = {}

        async def run(call: Call) -> None:
            limit = asyncio.timeout(timeout_s)
            try:
                async with limit:
                    value = await self._function(*call.positional, **call.named)
            except Exception as error:  # noqa: BLE001 boundary to a user's function, as above
                failed = self._late(call, timeout_s) if limit.expired() else self._raised(error, call)
                self._store(call, failed, results)
            else:
                self._store(call, self._read(value, call), results)

        await asyncio.gather(*(run(call) for call in self._calls(requests, results)))
        return [results[position] for position in range(len(requests))]

    def _calls(self, requests: Sequence[ScoreRequest], results: dict[int, Result]) -> list[Call]:
        """Return the calls to make; the results of those that can't be made are stored."""
        calls = []
        for call in self._builder.calls(requests):
            if isinstance(call, Call):
                calls.append(call)
            else:
                error = Result(error=call.what, place=self.place, num_items=len(call.positions))
                results.update((position, error) for position in call.positions)
        return calls

    def _store(self, call: Call, values: Sequence[Result] | Result, results: dict[int, Result]) -> None:
        values = [values] * len(call.positions) if isinstance(values, Result) else values
        results.update(zip(call.positions, values, strict=True))

    def _read(self, value: Any, call: Call) -> list[Result] | Result:
        try:
            returned = with_logs(self._returned(value, len(call.positions)), call.logs)
        except SignatureMismatch as error:
            return Result(error=str(error), place=self.place, num_items=len(call.positions))
        results = [result_of(each, may_be_none=self.kind == "trl") for each in returned]
        return [dataclasses.replace(each, place=self.place) if each.error else each for each in results]

    def _returned(self, value: Any, num: int) -> list[Returned]:
        if self.kind == "verl":
            return [from_verl(value)]
        if self.kind == "verl_batch":
            return from_verl_batch(value, num)
        return from_openrlhf(value, num) if self.kind == "openrlhf" else listed(value, num)

    def _raised(self, error: Exception, call: Call) -> Result:
        self._num_printed += 1
        if self._num_printed <= MAX_TRACEBACKS:
            traceback.print_exception(error, file=sys.stderr)
        place = line_that_raised(self._function, error, caller=__file__)
        what = f"raised {type(error).__name__}: {error}"
        return Result(error=what, place=place, has_raised=True, num_items=len(call.positions))

    def _late(self, call: Call, timeout_s: float) -> Result:
        return Result(error=late(timeout_s), place=self.place, num_items=len(call.positions))


def late(timeout_s: float) -> str:
    """Return the error of a call that was ended at its deadline."""
    return f"did not return within {timeout_s:g} s"


def _instance(function: type) -> Any:
    if "__call__" not in dir(function):
        raise SignatureMismatch("is a class whose instances can't be called: define __call__, or name a function")
    try:
        return function()
    except TypeError as error:
        raise SignatureMismatch(f"is a class that can't be made without arguments ({error})") from error


async def _awaited(value: Any) -> Any:
    return await value
