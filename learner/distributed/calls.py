"""Calls of a learner group from the event loop: one at a time, each with a deadline, that end in results or an error.

Knows of the ranks only that they answer together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.actors.remote import within
from cluster.errors import LearnerError
from learner.config import LearnerConfig
from learner.distributed.group import RankGroup

THREAD_END_S = 2.0
"""How long the thread of a call is waited for once its ranks are gone; it must not outlive Ray."""


class GroupCalls:
    """The learners of a stage. After any error the group is ended and every later call says so.

    Calls run one after the other. Each waits for all ranks, off the event loop, and raises LearnerError where one of
    them failed or died and DeadlineExceeded where they took longer than `step_timeout_s`.
    """

    def __init__(self, group: RankGroup, config: LearnerConfig) -> None:
        self._group = group
        self._config = config
        self._turn = asyncio.Lock()
        self._ended_by: BaseException | None = None

    async def shutdown(self) -> None:
        """End the ranks' processes. Write what must last before."""
        self._ended_by = self._ended_by or LearnerError("learner group", "it was shut down")
        await asyncio.to_thread(self._group.shutdown)

    @property
    def _num_ranks(self) -> int:
        return max(1, self._config.num_learners)

    async def _call(self, method: str, arguments: Sequence[Mapping[str, Any]]) -> list[Any]:
        return await self._run(method, lambda: self._group.call(method, arguments))

    async def _run(self, what: str, function: Callable[[], list[Any]]) -> list[Any]:
        """Run a blocking call in a thread until it ends or its time is over; any error ends the group."""
        timeout_s = self._config.step_timeout_s
        waited_for = f"{self._num_ranks} learners to finish {what}"
        async with self._turn:
            if self._ended_by is not None:
                raise LearnerError("learner group", f"it has ended: {self._ended_by}")
            work = asyncio.ensure_future(asyncio.to_thread(function))
            shielded = asyncio.shield(work)
            try:
                results: list[Any] = await within(shielded, timeout_s, where="learner group", waited_for=waited_for)
                return results
            except BaseException as error:
                self._ended_by = error
                self._group.shutdown()
                await asyncio.wait({asyncio.gather(work, return_exceptions=True)}, timeout=THREAD_END_S)
                raise
