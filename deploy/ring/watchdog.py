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

LOOK_EVERY_S = 5.0
ANSWER_TIMEOUT_S = 30.0
Result = TypeVar("Result")


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
