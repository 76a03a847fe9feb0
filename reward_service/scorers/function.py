"""What a scorer is, and the scorer that calls a user's Python function. Knows no model, no transport and no Ray.

A reward that cannot be had is an outcome of its own, a RewardError: nothing here puts a number in its place.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from pathlib import Path
from typing import Any

from cluster.errors import NotApplicable, RewardError
from cluster.files import digest_files
from cluster.scoring import Outcome, Score, ScoreRequest
from reward_service.scorers.signatures import Plugin, Returned, SignatureMismatch


class FunctionScorer:
    """Calls a user's function, sync or async, in any of `plugin`'s signatures, and believes nothing it returns.

    A sync function runs in one thread of its own, one call at a time, so it need not be thread-safe and never
    blocks the service. Errors carry `name`, and of a
    dotted path the function's name is what the reward's part is called.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self.version = f"{name}@{_source_digest(function)}"
        self._part = name.rpartition(":")[2]
        self._plugin = Plugin(function)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scorer")

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        if not requests:
            return []
        if self._plugin.kind == "verl" and len(requests) > 1:
            return [outcome for (outcome,) in await asyncio.gather(*(self.score([each]) for each in requests))]
        try:
            values = await self.call(requests)
        except SignatureMismatch as error:
            return self._all_failed(requests, str(error))
        except Exception as error:  # noqa: BLE001 the boundary to a user's scorer: whatever it raises is an outcome
            return self._all_failed(requests, f"raised {type(error).__name__}: {error}")
        return [self.outcome(request, value) for request, value in zip(requests, values, strict=True)]

    async def call(self, requests: Sequence[ScoreRequest]) -> list[Returned]:
        """What the function gives for each request. Raises SignatureMismatch, and whatever the function raises."""
        return await self._plugin(requests, self._thread)

    def close(self) -> None:
        """Let the thread end after the call it is in."""
        self._thread.shutdown(wait=False)

    def _all_failed(self, requests: Sequence[ScoreRequest], what: str) -> list[Outcome]:
        ids = [request.id for request in requests]
        which = ids[0] if len(ids) == 1 else f"{len(ids)} items, {ids[0]} to {ids[-1]}"
        return [RewardError(self.name, f"{what} (scoring {which})") for _ in requests]

    def outcome(self, request: ScoreRequest, returned: Returned) -> Outcome:
        """The score that a value is, or why it is none."""
        value = returned.value
        if value is None and self._plugin.kind == "trl":
            return NotApplicable(self.name, f"does not apply to {request.id} (it returned None)")
        if not isinstance(value, Real):
            return RewardError(self.name, f"returned {_shown(value)} for {request.id}, not a number")
        try:
            reward = float(value)
        except OverflowError:
            reward = math.inf
        if not math.isfinite(reward):
            return RewardError(self.name, f"returned {_shown(value)} for {request.id}, not a finite number")
        return Score(request.id, reward, {**returned.parts, self._part: reward}, self.version)


def _source_digest(function: Callable[..., Any]) -> str:
    try:
        source = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # built in, or an object with no file
        return "builtin"
    return digest_files([Path(source)]) if source else "builtin"


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {repr(value)[:60]}"
