"""The actor through which other commands control a running run."""

from __future__ import annotations

import asyncio


class RunControl:
    """What a running run can be told from outside; lives in a registered actor."""

    def __init__(self, num_rollout_actors: int) -> None:
        self._num_rollout_actors = num_rollout_actors
        self._is_a_persons = False
        self._changed = asyncio.Condition()

    async def set_num_rollout_actors(self, num: int) -> int:
        """A person asks for another number of rollout actors; returns the number asked for before."""
        self._is_a_persons = True
        return await self._set(num)

    async def suggest_num_rollout_actors(self, num: int) -> bool:
        """A policy asks for another number, which counts until a person has asked; whether it did."""
        if not self._is_a_persons:
            await self._set(num)
        return not self._is_a_persons

    async def _set(self, num: int) -> int:
        async with self._changed:
            before, self._num_rollout_actors = self._num_rollout_actors, num
            self._changed.notify_all()
            return before

    async def wait_num_rollout_actors(self, than: int) -> int:
        """Wait until another number than `than` is asked for; woken by `set_num_rollout_actors` and its like, ended
        by cancellation of the run."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._num_rollout_actors != than)
            return self._num_rollout_actors


def control_name(run_name: str) -> str:
    """Under which name a run's RunControl is registered."""
    return f"antiphon-control-{run_name}"
