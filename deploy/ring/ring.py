"""Runs one PPO run: closes the ring of queue, rollout actors, reward service, learner group and weights.

      prompts
         |
         v         admit                      score
    TrajectoryQueue -----> RolloutActor (many) <-----> reward service
         |    ^                |        ^
         |    +------ put -----+        | pull weights
         | take                         |
         v           publish            |
    training loop --------------> WeightStore
         |    ^
    step |    | manifest                every event: Recorder (journal)
         v    |
    learner group

What each part waits for, and who wakes it:
    rollout actor    a group from `TrajectoryQueue.admit`: woken by the publication of the version that the group needs
                     its rewards: woken by the reward service; retried for `reward_service.patience_s`
                     a newer version: woken by `WeightStore.publish`
    training loop    a step's groups from `TrajectoryQueue.take`: woken by the `put` or `void` of the last one missing
                     the learner group: woken by its ranks, or restarted after `learner.step_timeout_s`
                     the journal: woken by the Recorder once the records are on disk
    actor pool       the end of an actor, a failed probe, or another number of actors from `RunControl`
    step record      runs beside the next step; the record after it waits for it
    watchdog         ends the run if none of this makes progress for `run.progress_timeout_s`
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial

from cluster.actors.health import State
from cluster.actors.remote import RemoteActor
from deploy.ring.autoscaling import Autoscaler, IdleShareAutoscaler
from deploy.ring.calls import RingCalls
from deploy.ring.checkpoints import Checkpoints
from deploy.ring.healing import Publish, RestartingLearners
from deploy.ring.learners import start_learners
from deploy.ring.report import StepReport
from deploy.ring.resuming import Resumption
from deploy.ring.watchdog import watch
from deploy.runtime.pauses import first_missing, watch_rewards
from deploy.runtime.session import Session
from learner.ppo.group import PPOLearnerGroup
from learner.training_loop import Groups, StepResult, train


@dataclass(frozen=True, slots=True)
class Parts:
    """The started actors and learner group of a run, and the state that it resumes from."""

    control: RemoteActor
    queue: RemoteActor
    store: RemoteActor
    recorder: RemoteActor
    group: PPOLearnerGroup
    resumed: Resumption


class Ring:
    """One PPO run. `run` trains to the last step; `started` is the stage's start on the monotonic clock."""

    def __init__(self, session: Session, parts: Parts, *, started: float) -> None:
        self._session = session
        self._parts = parts
        self.learners = _restarting_learners(session, parts, publish=lambda manifest: self.calls.publish(manifest))
        self.calls = _calls(session, parts, self.learners)
        self._report = StepReport(session, parts.resumed, self.learners, started=started)
        self._checkpoints = Checkpoints(session, self.learners)
        self._writing: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Train to the last step while the actors sample; raises the error of the part that ended first."""
        session, queue = self._session, self._parts.queue
        rewards = await session.rewards()
        await self.calls.publish(await self.learners.publish_initial())
        self._report.ready()

        async def work(actor: RemoteActor) -> None:
            await actor.run(queue, self._parts.store, rewards)

        watching = asyncio.create_task(watch_rewards(lambda: session.pool.actors, rewards.waiting, session.view.note))
        try:
            async with asyncio.TaskGroup() as tasks:
                timeout_s = session.config.run.progress_timeout_s
                watchdog = tasks.create_task(watch(self._progress, self._describe_waits, timeout_s=timeout_s))
                wanted = self._parts.control.wait_num_rollout_actors
                tasks.create_task(session.pool.supervise(work, lost=queue.declare_dead, wanted=wanted))
                tasks.create_task(self._train(tasks, watchdog))
        finally:
            watching.cancel()

    async def _train(self, tasks: asyncio.TaskGroup, watchdog: asyncio.Task[None]) -> None:
        await train(
            first_step=self._parts.resumed.kept + 1,
            num_steps=self._session.config.learner.num_steps,
            learners=self.calls,
            queue=self.calls,
            weights=self.calls,
            report=partial(self._after_step, tasks),
        )
        watchdog.cancel()
        await self._session.pool.dismiss()

    async def _after_step(self, tasks: asyncio.TaskGroup, step: int, groups: Groups, result: StepResult) -> None:
        """Write the step's record beside the next step and, if it is due, a checkpoint after the record."""
        with self.calls.waiting_for(f"the record of step {step}"):
            self._report.step_done(step, result)
            time_s, counts = self._report.seconds(), await self._parts.queue.counts()
            if self._report.num_unnoted_void(counts) > 0:
                self._report.note_void(await self._parts.queue.voided())
            await self._written()
            self._writing = tasks.create_task(self._report.write(step, groups, result, time_s, counts))
            if self._checkpoints.is_due(step):
                await self._written()
                await self._checkpoints.write(step, counts)

    async def _written(self) -> None:
        """Wait for the record in progress. Its error is raised by the task group, not here."""
        if self._writing is not None:
            await asyncio.wait({self._writing})

    async def _progress(self) -> object:
        """Return a value that changes whenever the run makes progress or waits for rewards."""
        session = self._session
        rewards = await session.rewards()
        if rewards.waiting() or await first_missing(session.pool.actors):
            return object()
        totals, counts = await session.rollout_totals(), await self._parts.queue.counts()
        num_restarts, actors = self.learners.num_restarts, tuple(actor.name for actor in session.pool.actors)
        return self.calls.num_calls, counts, totals["num_sampled_tokens"], num_restarts, actors

    async def _describe_waits(self) -> str:
        """Describe what the training loop waits for and which groups each actor holds."""
        health, holders = self._session.pool.health, await self._parts.queue.holders()
        states = health.states if health else {}
        lines = [f"the training loop waits for {self.calls.waits_for}"]
        for name in sorted({*states, *holders}):
            groups = ", ".join(map(str, holders.get(name, [])[:8])) or "none"
            lines.append(f"{name} ({states.get(name, State.STARTING)}) holds groups: {groups}")
        return "; ".join(lines)


def _restarting_learners(session: Session, parts: Parts, *, publish: Publish) -> RestartingLearners:
    return RestartingLearners(
        parts.group,
        partial(start_learners, session, lengths=parts.resumed.lengths, phases=parts.resumed.phases),
        config=session.config.learner,
        run=session.run,
        version=parts.resumed.kept,
        publish=publish,
        note=session.view.note,
    )


def _calls(session: Session, parts: Parts, learners: RestartingLearners) -> RingCalls:
    async def sampled_tokens() -> float:
        return (await session.rollout_totals())["num_sampled_tokens"]

    return RingCalls(
        queue=parts.queue,
        learners=learners,
        store=parts.store,
        recorder=parts.recorder,
        resumed=parts.resumed,
        autoscaler=_autoscaler(session, parts.control),
        sampled_tokens=sampled_tokens,
        note=session.view.note,
    )


def _autoscaler(session: Session, control: RemoteActor) -> Autoscaler | None:
    """Return the autoscaler, or None if the number of actors is fixed."""
    settings = session.config.rollout_actors
    if settings.max_actors is None:
        return None
    policy = IdleShareAutoscaler(min_actors=settings.num_actors, max_actors=settings.max_actors)
    return Autoscaler(policy, control, num_actors=lambda: len(session.pool.actors), note=session.view.note)
