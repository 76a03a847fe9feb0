"""A scorer that calls a function in this process, for tests of signatures and of HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from cluster.scoring import Outcome, ScoreRequest
from reward_service.functions.caller import FunctionCaller
from reward_service.scorers.function import outcome


class InProcessScorer:
    """Calls a function as `FunctionScorer` does, without a process of its own."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.version = name, f"{name}@1"
        self._caller = FunctionCaller(function)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        results = await asyncio.to_thread(self._caller.results, requests)
        pairs = zip(requests, results, strict=True)
        return [outcome(request, result, name=self.name, version=self.version) for request, result in pairs]
