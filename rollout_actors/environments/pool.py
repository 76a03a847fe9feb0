"""The environments of one rollout actor, and the conversations that its engine holds with them, many at once.

There are as many environments as conversations at once; each is used again and again. Knows neither queue nor rewards.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from cluster.errors import EnvironmentFault
from rollout_actors.config import EnvironmentConfig
from rollout_actors.environments.host import Host, HostedHere, Threads
from rollout_actors.environments.process import HostedApart
from rollout_actors.environments.protocol import Environment, made


class Environments:
    """Made one by one when they are needed; one whose conversation did not come to its end is not used again."""

    def __init__(self, config: EnvironmentConfig) -> None:
        assert config.path is not None
        self._path = config.path
        self._config = config
        self._threads = Threads()
        self._free: list[Host] = []

    @asynccontextmanager
    async def one(self) -> AsyncIterator[Host]:
        """An environment for one conversation. Raises InputError or EnvironmentFault where it cannot be made.

        One whose conversation was given up may still be at work on an answer, which the next would take for its own.
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
            return HostedApart(self._path, config.settings, timeout_s=config.step_timeout_s)
        environment: Environment = made(self._path, config.settings)
        return HostedHere(environment, self._threads, timeout_s=config.step_timeout_s)

    async def _discard(self, host: Host) -> None:
        """What cannot be closed is at fault already."""
        try:
            await host.close()
        except EnvironmentFault:
            pass

    async def close(self) -> None:
        """Give back those that are free."""
        free, self._free = self._free, []
        for host in free:
            await self._discard(host)
        self._threads.close()


async def try_out(config: EnvironmentConfig, columns: Mapping[str, Any]) -> None:
    """Begin a conversation, answer nothing, and begin it again. Raises EnvironmentFault for what that shows."""
    assert config.path is not None
    environments = Environments(config)
    try:
        async with environments.one() as host:
            start = await host.reset(0, columns)
            await host.step("")
            if await host.reset(0, columns) != start:
                what = "reset(seed=0) begins otherwise the second time: all that is random must come from the seed"
                raise EnvironmentFault(config.path, what)
    finally:
        await environments.close()
