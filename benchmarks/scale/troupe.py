"""Many stand-in rollout actors as objects in few processes, where a machine has no room for a process each.

They call queue, recorder and weight store as actors of their own would. Knows no figure.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.scale.stand_ins import Pace, StandInActor
from cluster.actors.remote import RemoteActor
from rollout_actors.config import RolloutActorsConfig


class Troupe:
    """One process of stand-in actors."""

    def __init__(self, config: RolloutActorsConfig, pace: Pace) -> None:
        self._config = config
        self._pace = pace
        self._actors: dict[str, StandInActor] = {}

    async def join(self, name: str) -> None:
        """Start one more actor."""
        self._actors[name] = StandInActor(name, self._config, self._pace)
        await self._actors[name].start()

    async def call(self, name: str, method: str, *args: Any) -> Any:
        """Call a method of that actor."""
        return await getattr(self._actors[name], method)(*args)


class Member:
    """The face of one actor of a troupe."""

    def __init__(self, name: str, troupe: RemoteActor) -> None:
        self.name = name
        self._troupe = troupe

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        if method.startswith("_"):
            raise AttributeError(method)

        def call(*args: Any) -> Awaitable[Any]:
            called: Awaitable[Any] = self._troupe.call(self.name, method, *args)
            return called

        return call
