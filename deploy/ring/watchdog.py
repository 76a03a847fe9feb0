"""Ends a run that makes no progress, and says what each part was waiting for.

Every wait has its own deadline; the watchdog catches what they miss.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from cluster.errors import DeadlineExceeded

LOOK_EVERY_S = 5.0
ANSWER_TIMEOUT_S = 30.0


async def watch(
    progress: Callable[[], Awaitable[object]],
    describe: Callable[[], Awaitable[str]],
    *,
    timeout_s: float,
    every_s: float = LOOK_EVERY_S,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Call `progress` every `every_s` seconds and compare its value with the one before. Never returns.

    Raises DeadlineExceeded with the text of `describe` if the value has not changed for `timeout_s`; a call without an
    answer counts as no change.
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
                "run", f"nothing moved for {timeout_s:g} s (run.progress_timeout_s): {await _description(describe)}"
            )
        await asyncio.sleep(every_s)


async def _description(describe: Callable[[], Awaitable[str]]) -> str:
    try:
        return await asyncio.wait_for(describe(), ANSWER_TIMEOUT_S)
    except TimeoutError:
        return f"its parts did not answer within {ANSWER_TIMEOUT_S:g} s"
