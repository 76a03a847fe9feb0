"""The actor through which other commands control a running run."""

from __future__ import annotations

import asyncio


class RunControl:
    """Holds the requested number of rollout actors of a running run; a registered actor, so other commands find it."""

    def __init__(self, num_rollout_actors: int) -> None:
        self._num_rollout_actors = num_rollout_actors
        self._is_set_by_person = False
        self._changed = asyncio.Condition()

    async def set_num_rollout_actors(self, num: int) -> int:
        """Set the number on a person's request, which ends suggestions; returns the previous number."""
        self._is_set_by_person = True
        return await self._set(num)

    async def suggest_num_rollout_actors(self, num: int) -> bool:
        """Set the number on an autoscaler's request unless a person has set it; returns whether it was set."""
        if not self._is_set_by_person:
            await self._set(num)
        return not self._is_set_by_person

    async def _set(self, num: int) -> int:
        async with self._changed:
            before, self._num_rollout_actors = self._num_rollout_actors, num
            self._changed.notify_all()
            return before

    async def wait_num_rollout_actors(self, than: int) -> int:
        """Wait until the requested number differs from `than` and return it; woken by the two setters."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._num_rollout_actors != than)
            return self._num_rollout_actors


def control_name(run_name: str) -> str:
    """Return the name under which a run's RunControl is registered."""
    return f"antiphon-control-{run_name}"
