"""Run a whole ring of Ray actors that starts in seconds: only engines, rewards and learner are stand-ins.

Queue, recorder, weight store, rollout actors with their supervision, training loop and recording are real. Benchmarks
measure their cost, and chaos tests kill them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from benchmarks.scale.host import ActorHost, HostedActor
from benchmarks.scale.stand_ins import OneToAll, Pace, StandInActor, StandInLearners, manifest
from cluster.actors.control import RunControl
from cluster.actors.pool import ActorPool
from cluster.actors.remote import RemoteActor, kill_actor, start_actor, within
from cluster.config import TrajectoryQueueConfig
from cluster.data.prompt_order import TaskPrompts
from cluster.journal.recorder import Recorder
from cluster.ledger import QueueCounts
from cluster.queue.trajectory_queue import TrajectoryQueue
from cluster.weights.store import WeightStore
from deploy.ring.calls import RingCalls
from learner.training_loop import Groups, StepResult, train
from rollout_actors.config import RolloutActorsConfig

ROWS = [{"prompt": f"prompt {number}"} for number in range(1000)]
START_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Size and length of a run of the ring, and speed of its stand-ins."""

    num_actors: int
    num_steps: int
    actors_a_process: int = 1
    """If more than 1, actors are objects in few processes and cannot be killed individually."""
    groups_per_step: int = 16
    max_policy_lag: int = 2
    responses_per_prompt: int = 1
    max_response_tokens: int = 64
    num_concurrent_groups: int = 8
    max_restarts: int = 1
    max_resamples: int = 0
    pace: Pace = field(default_factory=Pace)
    learn_s: float = 0.0

    def rollout_actors(self) -> RolloutActorsConfig:
        """Return the settings of every actor."""
        return RolloutActorsConfig(
            num_actors=self.num_actors,
            responses_per_prompt=self.responses_per_prompt,
            max_response_tokens=self.max_response_tokens,
            num_concurrent_groups=self.num_concurrent_groups,
            max_restarts=self.max_restarts,
        )

    def trajectory_queue(self) -> TrajectoryQueueConfig:
        """Return the settings of the queue."""
        return TrajectoryQueueConfig(
            groups_per_step=self.groups_per_step, max_policy_lag=self.max_policy_lag, take_timeout_s=120
        )


Report = Callable[[int], Awaitable[None]]


async def _no_report(step: int) -> None:
    return None


class StandInRing:
    """Parts of one run. `turn` runs it from version 0 to its last step; until then the actors wait in `pool`."""

    def __init__(self, plan: Plan, queue: RemoteActor, store: RemoteActor, recorder: RemoteActor) -> None:
        self.plan = plan
        self.queue = queue
        self.store = store
        self.recorder = recorder
        self.control = RunControl(plan.num_actors)
        self.notes: list[str] = []
        self._hosts: list[RemoteActor] = []
        self._num_hosted = 0
        self.pool = ActorPool(
            self._start_actor, self._stop_actor, name="rollout", max_restarts=plan.max_restarts, note=self.notes.append
        )

    async def _start_actor(self, name: str) -> RemoteActor:
        if self.plan.actors_a_process > 1:
            return cast(RemoteActor, await self._join_host(name))
        actor = start_actor(StandInActor, name, self.plan.rollout_actors(), self.plan.pace, name=name)
        await within(actor.start(), START_TIMEOUT_S, where=name, waited_for="its start")
        return actor

    async def _join_host(self, name: str) -> HostedActor:
        number, self._num_hosted = self._num_hosted, self._num_hosted + 1
        if number % self.plan.actors_a_process == 0:
            host = start_actor(ActorHost, self.plan.rollout_actors(), self.plan.pace, name=f"host of {name}")
            self._hosts.append(host)
        host = self._hosts[-1]
        await within(host.join(name), START_TIMEOUT_S, where=name, waited_for="its start")
        return HostedActor(name, host)

    async def _stop_actor(self, actor: RemoteActor | HostedActor) -> None:
        if isinstance(actor, RemoteActor):
            kill_actor(actor)

    async def close(self) -> None:
        """Stop the processes of all actors."""
        await self.pool.close()
        for host in self._hosts:
            kill_actor(host)

    async def turn(self, report: Report = _no_report) -> QueueCounts:
        """Train every step while the actors sample; call `report` after each step. Returns the queue's counts."""
        learners = StandInLearners(self.plan.learn_s)
        calls = RingCalls(queue=self.queue, learners=learners, store=self.store, recorder=self.recorder)
        await self.recorder.begin("stand-in", version=0, group=0, num_steps=self.plan.num_steps)
        await calls.publish(manifest(0))

        async def work(actor: RemoteActor) -> None:
            await actor.run(self.queue, self.store, OneToAll())

        async with asyncio.TaskGroup() as parts:
            parts.create_task(
                self.pool.supervise(work, lost=self.queue.declare_dead, wanted=self.control.wait_num_rollout_actors)
            )
            parts.create_task(self._train(calls, report))
        counts: QueueCounts = await self.queue.counts()
        return counts

    async def _train(self, calls: RingCalls, report: Report) -> None:
        async def report_step(step: int, groups: Groups, result: StepResult) -> None:
            await report(step)

        await train(
            first_step=1,
            num_steps=self.plan.num_steps,
            learners=calls,
            queue=calls,
            weights=calls,
            report=report_step,
        )
        await self.pool.dismiss()


@asynccontextmanager
async def stand_in_ring(plan: Plan, folder: Path, *, recorder_class: type = Recorder) -> AsyncIterator[StandInRing]:
    """Start a ring on the current Ray and yield it when its actors are ready; the journal is in `folder`.

    On exit, closes the journal and stops all processes.
    """
    recorder = start_actor(recorder_class, folder, name="recorder", pinned_and_restarted=True)
    queue = start_actor(
        TrajectoryQueue,
        plan.trajectory_queue(),
        [TaskPrompts("stand-in", ROWS)],
        run_seed=0,
        max_resamples=plan.max_resamples,
        num_steps=plan.num_steps,
        recorder=recorder,
        name="trajectory_queue",
    )
    store = start_actor(WeightStore, name="weight_store")
    ring = StandInRing(plan, queue, store, recorder)
    try:
        await ring.pool.fill(plan.num_actors)
        yield ring
        await recorder.close()
    finally:
        await ring.close()
        for part in (queue, store, recorder):
            kill_actor(part)
