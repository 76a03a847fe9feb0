"""Runs many stand-in rollout actors in one process, for machines that have no room for a process each.

They call queue, recorder and weight store as separate actors would.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.scale.stand_ins import Pace, StandInActor
from cluster.actors.remote import RemoteActor
from rollout_actors.config import RolloutActorsConfig


class ActorHost:
    """A process of stand-in actors."""

    def __init__(self, config: RolloutActorsConfig, pace: Pace) -> None:
        self._config = config
        self._pace = pace
        self._actors: dict[str, StandInActor] = {}

    async def join(self, name: str) -> None:
        """Start another actor in this process."""
        self._actors[name] = StandInActor(name, self._config, self._pace)
        await self._actors[name].start()

    async def call(self, name: str, method: str, *args: Any) -> Any:
        """Call a method of the actor `name`."""
        return await getattr(self._actors[name], method)(*args)


class HostedActor:
    """Calls one actor of a host as if it were a Ray actor."""

    def __init__(self, name: str, host: RemoteActor) -> None:
        self.name = name
        self._host = host

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        if method.startswith("_"):
            raise AttributeError(method)

        def call(*args: Any) -> Awaitable[Any]:
            called: Awaitable[Any] = self._host.call(self.name, method, *args)
            return called

        return call
