"""The pool of environments of a rollout actor, one for each concurrent conversation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from cluster.errors import EnvironmentFault
from rollout_actors.config import EnvironmentConfig
from rollout_actors.environments.host import Host, InProcessHost, Threads
from rollout_actors.environments.process import SubprocessHost
from rollout_actors.environments.protocol import Environment, make_environment


class EnvironmentPool:
    """Pool of environments, created on demand.

    An environment is reused only after a finished conversation.
    """

    def __init__(self, config: EnvironmentConfig) -> None:
        assert config.path is not None
        self._path = config.path
        self._config = config
        self._threads = Threads()
        self._free: list[Host] = []

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[Host]:
        """Lend an environment for one conversation.

        Closes it if the conversation was cancelled or failed: it may still be computing an answer, which the next
        conversation would receive. Raises InputError or EnvironmentFault if it cannot be made.
        """
        host = self._free.pop() if self._free else self._make()
        try:
            yield host
        except BaseException:
            await self._discard(host)
            raise
        self._free.append(host)

    def _make(self) -> Host:
        config = self._config
        if config.own_process:
            return SubprocessHost(self._path, config.settings, timeout_s=config.step_timeout_s)
        environment: Environment = make_environment(self._path, config.settings)
        return InProcessHost(environment, self._threads, timeout_s=config.step_timeout_s)

    async def _discard(self, host: Host) -> None:
        """Close the environment; ignore a fault, since it is not used again."""
        with suppress(EnvironmentFault):
            await host.close()

    async def close(self) -> None:
        """Close the idle environments."""
        free, self._free = self._free, []
        for host in free:
            await self._discard(host)
        self._threads.close()


async def try_out(config: EnvironmentConfig, columns: Mapping[str, Any]) -> list[str]:
    """Start a conversation, send an empty response, start again; returns the names of the functions that it offers.

    Raises EnvironmentFault if that fails or differs.
    """
    assert config.path is not None
    environments = EnvironmentPool(config)
    try:
        async with environments.acquire() as host:
            start = await host.reset(0, columns)
            await host.step("")
            if await host.reset(0, columns) != start:
                what = "reset(seed=0) returned something else the second time: take all randomness from the seed"
                raise EnvironmentFault(config.path, what)
            return [schema["function"]["name"] for schema in await host.tools()]
    finally:
        await environments.close()
