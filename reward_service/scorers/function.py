"""The kind `function`: a scorer that calls a user's Python function.

A reward that the function does not give is a RewardError outcome, never a number.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from pathlib import Path
from typing import Any

from cluster import user_code
from cluster.errors import InputError, NotApplicable, RewardError
from cluster.files import digest_files
from cluster.scoring import Outcome, Score, ScoreRequest
from reward_service.config.composite import REWARD_MODEL
from reward_service.config.scorers import FunctionConfig
from reward_service.scorers.scorer import Builder, Kind, Scorer, register_kind, setting_key
from reward_service.scorers.signatures import FunctionCaller, Returned, SignatureMismatch


class FunctionScorer:
    """Calls a user's function in any signature of `signatures`, and checks what it returns.

    A sync function runs in one separate thread, one call at a time: it need not be thread-safe and never blocks the
    event loop. Errors carry `name`. If `name` is a dotted path, the reward's part has the function's name.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self.version = f"{name}@{_source_digest(function)}"
        self._part = name.rpartition(":")[2]
        self._caller = FunctionCaller(function)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scorer")

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """Return one outcome per request, in order."""
        if not requests:
            return []
        if self._caller.kind == "verl" and len(requests) > 1:
            return [outcome for (outcome,) in await asyncio.gather(*(self.score([each]) for each in requests))]
        try:
            values = await self.call(requests)
        except SignatureMismatch as error:
            return self._all_failed(requests, str(error))
        except Exception as error:  # noqa: BLE001 boundary to a user's scorer: whatever it raises is the outcome
            return self._all_failed(requests, f"raised {what_raised(error)}")
        return [self.outcome(request, value) for request, value in zip(requests, values, strict=True)]

    async def call(self, requests: Sequence[ScoreRequest]) -> list[Returned]:
        """Return the function's value per request. Raises SignatureMismatch and whatever the function raises."""
        return await self._caller(requests, self._thread)

    def close(self) -> None:
        """Let the thread end after its current call."""
        self._thread.shutdown(wait=False)

    def _all_failed(self, requests: Sequence[ScoreRequest], what: str) -> list[Outcome]:
        ids = [request.id for request in requests]
        which = ids[0] if len(ids) == 1 else f"{len(ids)} items, {ids[0]} to {ids[-1]}"
        return [RewardError(self.name, f"{what} (scoring {which})") for _ in requests]

    def outcome(self, request: ScoreRequest, returned: Returned) -> Outcome:
        """Return the score of a returned value, or the reason why it is not a score."""
        value = returned.value
        if value is None and self._caller.kind == "trl":
            return NotApplicable(self.name, f"does not apply to {request.id} (it returned None)")
        if not isinstance(value, Real):
            return RewardError(self.name, f"returned {_short(value)} for {request.id}, not a number")
        try:
            reward = float(value)
        except OverflowError:
            reward = math.inf
        if not math.isfinite(reward):
            return RewardError(self.name, f"returned {_short(value)} for {request.id}, not a finite number")
        return Score(request.id, reward, {**returned.parts, self._part: reward}, self.version)


def what_raised(error: Exception) -> str:
    """Return an error's type and text, and what to do if the function needs the main thread."""
    text = f"{type(error).__name__}: {error}"
    if "main thread" in str(error) or "threaded environment" in str(error):
        text += "; reward functions run outside the main thread: use no signals (math-verify: parsing_timeout=None and "
        text += "timeout_seconds=None), or the scorer kind math"
    return text


def load_function(dotted_path: str, where: str) -> Callable[..., Any]:
    """Import and return the function at ``package.module:function``.

    Raises InputError at `where` if it can't.
    """
    if ":" not in dotted_path:
        raise InputError(where, f"{dotted_path!r} is neither {REWARD_MODEL!r} nor of the form module:function")
    return user_code.load(dotted_path, where)


def _source_digest(function: Callable[..., Any]) -> str:
    source = user_code.source_file(function)
    return digest_files([Path(source)]) if source else "builtin"


def _short(value: Any) -> str:
    return f"{type(value).__name__} {repr(value)[:60]}"


def _build(name: str, config: FunctionConfig, builder: Builder) -> Scorer:
    return FunctionScorer(name, load_function(config.path, setting_key(name, "path")))


def _check_environment(name: str, config: FunctionConfig) -> None:
    load_function(config.path, setting_key(name, "path"))


register_kind(FunctionConfig, Kind(_build, check_environment=_check_environment))
