"""What a scorer is, and the scorer that calls a user's Python function. Knows no model, no transport and no Ray.

A reward that cannot be had is an outcome of its own, a RewardError: nothing here puts a number in its place.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

from cluster.errors import RewardError
from cluster.scoring import Score, ScoreRequest

Outcome = Score | RewardError


class Scorer(Protocol):
    """Judges responses one by one: the same request and version always get the same reward."""

    name: str
    version: str

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """One outcome a request, in their order; what could not be scored is a RewardError naming its id."""


class FunctionScorer:
    """Calls `function(prompts, responses, **columns)`, sync or async, and believes nothing it returns.

    A sync function runs in one thread of its own, one call at a time, so it need not be thread-safe and never
    blocks the service. `name` is its dotted path; errors carry it.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self.version = f"{name}@{_source_digest(function)}"
        self._function = function
        self._accepted = _accepted_columns(function)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scorer")

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        if not requests:
            return []
        try:
            values = await self._call(requests)
        except Exception as error:  # noqa: BLE001 the boundary to a user's scorer: whatever it raises is an outcome
            what = f"raised {type(error).__name__}: {error}"
            return self._all_failed(requests, what)
        if not isinstance(values, list | tuple):
            return self._all_failed(requests, f"returned {type(values).__name__}, not a list")
        if len(values) != len(requests):
            return self._all_failed(requests, f"returned {len(values)} rewards for {len(requests)} responses")
        return [self._outcome(request, value) for request, value in zip(requests, values, strict=True)]

    async def _call(self, requests: Sequence[ScoreRequest]) -> Any:
        prompts = [request.prompt for request in requests]
        responses = [request.response for request in requests]
        columns = self._columns(requests)
        if inspect.iscoroutinefunction(self._function):
            return await self._function(prompts, responses, **columns)
        loop = asyncio.get_running_loop()
        values = await loop.run_in_executor(self._thread, lambda: self._function(prompts, responses, **columns))
        return await values if inspect.isawaitable(values) else values

    def _columns(self, requests: Sequence[ScoreRequest]) -> dict[str, list[Any]]:
        """Every column that any request has and the function takes, one value a request (None where it has none)."""
        names = dict.fromkeys(name for request in requests for name in request.columns)
        wanted = [name for name in names if self._accepted is None or name in self._accepted]
        return {name: [request.columns.get(name) for request in requests] for name in wanted}

    def _all_failed(self, requests: Sequence[ScoreRequest], what: str) -> list[Outcome]:
        ids = [request.id for request in requests]
        which = ids[0] if len(ids) == 1 else f"{len(ids)} items, {ids[0]} to {ids[-1]}"
        return [RewardError(self.name, f"{what} (scoring {which})") for _ in requests]

    def _outcome(self, request: ScoreRequest, value: Any) -> Outcome:
        if not isinstance(value, Real):
            return RewardError(self.name, f"returned {_shown(value)} for {request.id}, not a number")
        try:
            reward = float(value)
        except OverflowError:
            reward = math.inf
        if not math.isfinite(reward):
            return RewardError(self.name, f"returned {_shown(value)} for {request.id}, not a finite number")
        return Score(request.id, reward, {self.name.rpartition(":")[2]: reward}, self.version)


def digest_files(paths: Sequence[Path]) -> str:
    """The first 12 hexadecimal digits of sha256 over the files' bytes, in the given order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:12]


def _source_digest(function: Callable[..., Any]) -> str:
    try:
        source = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # built in, or an object with no file
        return "builtin"
    return digest_files([Path(source)]) if source else "builtin"


def _accepted_columns(function: Callable[..., Any]) -> frozenset[str] | None:
    """Names of the columns the function takes; None when it takes all (`**columns`)."""
    parameters = list(inspect.signature(function).parameters.values())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters[2:])


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {repr(value)[:60]}"
