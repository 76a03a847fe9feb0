"""Calls a learner group from the event loop: one call at a time, each with a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from cluster.actors.remote import within
from cluster.errors import LearnerError
from learner.config import LearnerConfig
from learner.distributed.group import RankGroup

THREAD_END_S = 2.0
"""How long to wait for a call's thread after its ranks were killed; the thread must not outlive Ray."""


class GroupCalls:
    """Calls the learners of a stage. After an error the group is shut down, and later calls raise.

    Calls run one after the other. Each waits for all ranks, off the event loop, and raises LearnerError if a rank
    failed or died, or DeadlineExceeded after `step_timeout_s`.
    """

    def __init__(self, group: RankGroup, config: LearnerConfig) -> None:
        self._group = group
        self._config = config
        self._turn = asyncio.Lock()
        self._ended_by: BaseException | None = None

    async def shutdown(self) -> None:
        """Kill the ranks' processes. Write what must last before."""
        self._ended_by = self._ended_by or LearnerError("learner group", "it was shut down")
        await asyncio.to_thread(self._group.shutdown)

    @property
    def _num_ranks(self) -> int:
        return max(1, self._config.num_learners)

    async def call_rank(self, name: str, *arguments: Any) -> list[Any]:
        """Call the method `name` of every rank with the same arguments; returns their results in rank order."""
        return await self._call_each(name, [arguments] * self._num_ranks)

    async def _call_each(self, name: str, arguments: Sequence[Sequence[Any]]) -> list[Any]:
        """Call the method `name` of every rank, rank r with `arguments[r]`."""
        return await self._run(name, lambda: self._group.call_rank(name, arguments))

    async def _run(self, work_name: str, function: Callable[[], list[Any]]) -> list[Any]:
        """Run a blocking call in a thread until it ends or its deadline passes.

        Any error shuts the group down.
        """
        timeout_s = self._config.step_timeout_s
        waited_for = f"{self._num_ranks} learners to finish {work_name}"
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
