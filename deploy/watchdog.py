"""Ends a run in which nothing moves, and says what everybody was waiting for.

Every wait has a deadline of its own; this is for what they overlook. Knows neither queue nor learners: it is told what
moves, and asks others for their words.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from cluster.errors import DeadlineExceeded
from cluster.trajectory import Trajectory
from cluster.weights.manifest import Manifest
from learner.training_loop import Groups, LearnsFromGroups, PublishesWeights, StepResult, TakesGroups

LOOK_EVERY_S = 5.0
ANSWER_TIMEOUT_S = 30.0
Result = TypeVar("Result")


class ToldCalls:
    """The queue, the learners and the weights as the training loop calls them; `waits_for` says what for now."""

    def __init__(self, queue: TakesGroups, learners: LearnsFromGroups, weights: PublishesWeights) -> None:
        self._queue = queue
        self._learners = learners
        self._weights = weights
        self.num_calls = 0
        self.waits_for = "its first step"

    async def take(self, step: int) -> list[list[Trajectory]]:
        """The groups of a step."""
        return await self.told(f"the groups of step {step}", self._queue.take(step))

    async def step(self, step: int, groups: Groups) -> StepResult:
        """One step."""
        return await self.told(f"the learner group to train step {step}", self._learners.step(step, groups))

    async def publish(self, manifest: Manifest) -> None:
        """Make a version available."""
        await self.told(f"version {manifest.version} to be published", self._weights.publish(manifest))

    async def told(self, what: str, call: Awaitable[Result]) -> Result:
        """The call's result; `what` is waited for meanwhile."""
        self.num_calls += 1
        self.waits_for = what
        return await call


async def watch(
    progress: Callable[[], Awaitable[object]],
    words: Callable[[], Awaitable[str]],
    *,
    timeout_s: float,
    every_s: float = LOOK_EVERY_S,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Compare what `progress` answers with what it answered before, again and again. Never returns.

    Raises DeadlineExceeded with `words` once it has been the same for `timeout_s`, or has not been answered.
    """
    last, changed_at = object(), clock()
    while True:
        try:
            now = await asyncio.wait_for(progress(), ANSWER_TIMEOUT_S)
        except TimeoutError:
            now = last
        if now != last:
            last, changed_at = now, clock()
        elif clock() - changed_at > timeout_s:
            raise DeadlineExceeded(
                "run", f"nothing moved for {timeout_s:g} s (run.progress_timeout_s): {await _said(words)}"
            )
        await asyncio.sleep(every_s)


async def _said(words: Callable[[], Awaitable[str]]) -> str:
    try:
        return await asyncio.wait_for(words(), ANSWER_TIMEOUT_S)
    except TimeoutError:
        return "nobody answers what it waits for"
