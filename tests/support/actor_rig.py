"""The queue, weights, rewards and engines around a rollout actor under test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from cluster.config import TrajectoryQueueConfig
from cluster.data.prompt_order import TaskPrompts
from cluster.queue.trajectory_queue import TrajectoryQueue
from cluster.weights.manifest import Manifest
from cluster.weights.store import WeightStore
from rollout_actors.actor import RolloutActor
from rollout_actors.config import RolloutActorsConfig
from tests.support.fakes import FakeEngine, FakeRewardClient, fake_manifest

ROWS = [{"prompt": f"t5 t6 t{10 + i}", "reference": i} for i in range(8)]


class Rig:
    """Queue, weights, rewards and engines of one run. `actor` starts an actor for it."""

    def __init__(
        self,
        folder: Path,
        *,
        num_steps: int = 2,
        lag: int = 1,
        groups: int = 2,
        prompts: Sequence[TaskPrompts] = (TaskPrompts("test", ROWS),),
        **config: Any,
    ) -> None:
        self.folder = folder
        settings = {"responses_per_prompt": 2, "max_prompt_tokens": 4, "max_response_tokens": 3}
        self.config = RolloutActorsConfig(**{**settings, **config})
        self.queue = TrajectoryQueue(
            TrajectoryQueueConfig(groups_per_step=groups, max_policy_lag=lag, take_timeout_s=20),
            prompts,
            run_seed=3,
            num_steps=num_steps,
        )
        self.weights = WeightStore()
        self.rewards = FakeRewardClient()
        self.engines: dict[str, FakeEngine] = {}
        self.fetched: list[int] = []

    @asynccontextmanager
    async def actor(self, name: str = "rollout-0", **kwargs: Any) -> AsyncIterator[RolloutActor]:
        self.engines[name] = FakeEngine()
        actor = RolloutActor(
            name,
            self.config,
            model_path=str(self.folder),
            dtype="float32",
            seed=0,
            build_engine=lambda: self.engines[name],
            fetch_tensors=self._fetch,
            **kwargs,
        )
        await actor.start()
        yield actor
        await actor.close()

    def _fetch(self, manifest: Manifest) -> dict[str, Any]:
        self.fetched.append(manifest.version)
        return {}

    def run(self, actor: RolloutActor) -> asyncio.Task[None]:
        return asyncio.ensure_future(actor.run(self.queue, self.weights, self.rewards))

    async def publish(self, version: int) -> None:
        await self.weights.publish(fake_manifest(version))
        await self.queue.published(version)
