"""The PPO stage: closes the ring of queue, rollout actors, reward service, learner group and weights.

The only place that knows all of them; each knows only the faces it is given.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from cluster.actors.health import State
from cluster.actors.remote import RemoteActor
from cluster.ledger import QueueCounts
from cluster.trajectory import write_trajectories
from deploy.evaluation.held_out import HeldOut
from deploy.ring.autoscaling import IdleShareAutoscaler
from deploy.ring.calls import (
    ElasticQueue,
    PublishedOnce,
    PublishedWeights,
    RecordedFirst,
    RecordedLearners,
    RecordedWeights,
    ToldCalls,
    Watched,
)
from deploy.ring.healing import NUM_RESTARTS, RestartingLearners
from deploy.ring.learners import start_learners
from deploy.ring.report import task_metrics
from deploy.ring.resuming import POSITION, Resumption
from deploy.ring.watchdog import watch
from deploy.runtime.pauses import first_missing, watch_rewards
from deploy.runtime.session import Session
from learner.ppo.group import PPOLearnerGroup
from learner.training_loop import Groups, StepResult, TakesGroups, train


class Ring:
    """One PPO run with all its parts."""

    def __init__(
        self,
        session: Session,
        control: RemoteActor,
        queue: RemoteActor,
        store: RemoteActor,
        recorder: RemoteActor,
        learners: PPOLearnerGroup,
        resumed: Resumption,
        started: float,
    ) -> None:
        self._session = session
        self._control = control
        self._queue = queue
        published = RecordedWeights(PublishedWeights(store, queue), recorder)
        self._weights = PublishedOnce(published, resumed, session.view.note)
        self._store = store
        self.recorder = recorder
        self._resumed = resumed
        self._started = self._ready = started
        before = session.run.last_ppo_step()
        self._last_row = before.get("step", 0)
        self._num_noted_void = 0
        self._num_episodes = before.get("num_episodes", 0)
        self._of_tasks = {key: value for key, value in before.items() if key.startswith("tasks/")}
        self._num_optimizer_steps = before.get("optimizer_step", 0)
        self._policy_lag_max = session.run.summary().get("policy_lag_max", 0.0)
        self._recording: asyncio.Task[None] | None = None
        self.learners = RestartingLearners(
            learners,
            partial(start_learners, session, lengths=resumed.lengths),
            config=session.config.learner,
            run=session.run,
            version=resumed.kept,
            weights=self._weights,
            note=session.view.note,
        )
        self._calls = ToldCalls(
            RecordedFirst(self._taken_from(), resumed),
            RecordedLearners(Watched(self.learners, session), recorder),
            self._weights,
        )
        self._held_out = HeldOut(session, self.learners)

    async def turn(self) -> None:
        """Train to the last step while the actors sample; raises the error of the part that ended first."""
        rewards = await self._session.rewards()
        await self._weights.publish(await self.learners.publish_initial())
        self._ready = time.monotonic()
        self._session.run.update_summary({"ready_s": self._ready - self._started})

        async def work(actor: RemoteActor) -> None:
            await actor.run(self._queue, self._store, rewards)

        watching = asyncio.create_task(
            watch_rewards(lambda: self._session.pool.actors, rewards.waiting, self._session.view.note)
        )
        try:
            async with asyncio.TaskGroup() as parts:
                timeout_s = self._session.config.run.progress_timeout_s
                watchdog = parts.create_task(watch(self._progress, self._who_waits, timeout_s=timeout_s))
                parts.create_task(
                    self._session.pool.supervise(
                        work, lost=self._queue.declare_dead, wanted=self._control.wait_num_rollout_actors
                    )
                )
                parts.create_task(self._train(parts, watchdog))
        finally:
            watching.cancel()

    async def _progress(self) -> object:
        """Something else whenever anything has moved, or rewards are waited for."""
        session = self._session
        rewards = await session.rewards()
        if rewards.waiting() or await first_missing(session.pool.actors):
            return object()
        totals, counts = await session.rollout_totals(), await self._queue.counts()
        num_restarts, actors = self.learners.num_restarts, tuple(actor.name for actor in session.pool.actors)
        return self._calls.num_calls, counts, totals["num_sampled_tokens"], num_restarts, actors

    async def _who_waits(self) -> str:
        """What the training loop waits for, and who holds what."""
        health, holders = self._session.pool.health, await self._queue.holders()
        states = health.states if health else {}
        words = [f"the training loop waits for {self._calls.waits_for}"]
        for name in sorted({*states, *holders}):
            groups = ", ".join(map(str, holders.get(name, [])[:8])) or "none"
            words.append(f"{name} ({states.get(name, State.STARTING)}) holds groups: {groups}")
        return "; ".join(words)

    async def _train(self, parts: asyncio.TaskGroup, watchdog: asyncio.Task[None]) -> None:
        async def report(step: int, groups: Groups, result: StepResult) -> None:
            await self._calls.told(f"the record of step {step}", self._report(step, groups, result, parts))

        await train(
            first_step=self._resumed.kept + 1,
            num_steps=self._session.config.learner.num_steps,
            learners=self._calls,
            queue=self._calls,
            weights=self._calls,
            report=report,
        )
        watchdog.cancel()
        await self._session.pool.dismiss()

    def _taken_from(self) -> TakesGroups:
        """The queue; where the number of actors may change by itself, what is waited for there changes it."""
        session, settings = self._session, self._session.config.rollout_actors
        if settings.max_actors is None:
            return self._queue
        policy = IdleShareAutoscaler(min_actors=settings.num_actors, max_actors=settings.max_actors)
        return ElasticQueue(
            self._queue,
            policy,
            self._control,
            num_actors=lambda: len(session.pool.actors),
            note=session.view.note,
        )

    async def _report(self, step: int, groups: Groups, result: StepResult, parts: asyncio.TaskGroup) -> None:
        """Record a step beside the next one, after the record of the one before; keep it now if it is time.

        What is kept was recorded first: a run goes on from a step that is whole on disk.
        """
        if step == self._resumed.trained + 1:
            self._first_step_done(result.metrics["learner/step_s"])
        now_s, counts = time.monotonic() - self._started, await self._queue.counts()
        await self._note_voided(counts.num_void - self._resumed.standing.num_void)
        await self._recorded()
        self._recording = parts.create_task(self._record(step, groups, result, now_s, counts))
        if self._is_kept(step):
            await self._recorded()
            await self._keep(step, counts)

    async def _note_voided(self, num: int) -> None:
        """Say which groups were given up since the last step, and why."""
        if num > self._num_noted_void:
            for uid, reason in (await self._queue.voided())[self._num_noted_void : num]:
                self._session.view.note(f"the group of {uid} is void: {reason}")
            self._num_noted_void = num

    async def _recorded(self) -> None:
        """Wait for the record under way; its error ends the run by itself."""
        if self._recording is not None:
            await asyncio.wait({self._recording})

    async def _record(self, step: int, groups: Groups, result: StepResult, now_s: float, counts: QueueCounts) -> None:
        """Write the step's trajectories and its row of metrics, unless both were written before the run stopped."""
        if step <= self._last_row:
            self._session.view.step({"step": step, **result.metrics})
            return
        trajectories = [trajectory for group in groups for trajectory in group]
        path = self._session.run.path / "trajectories" / f"step-{step:06d}.arrow"
        await asyncio.to_thread(write_trajectories, path, trajectories)
        self._num_episodes += len(trajectories)
        self._num_optimizer_steps += result.num_optimizer_steps
        self._say_if_short(step, result.num_optimizer_steps)
        self._session.log_step("ppo", await self._metrics(step, result, trajectories, counts) | {"time_s": now_s})
        self._session.run.update_status(step=step)

    def _say_if_short(self, step: int, num_done: int) -> None:
        learner = self._session.config.learner
        num = learner.num_epochs * learner.num_minibatches
        if num_done < num:
            what = f"beyond learner.max_step_kl_nats = {learner.max_step_kl_nats:g}"
            self._session.view.note(f"step {step} ended after {num_done} of {num} optimiser steps, {what}")

    def _first_step_done(self, step_s: float) -> None:
        now = time.monotonic()
        self._session.run.update_summary({"first_ppo_step_s": now - self._started})
        self._session.start_up.first_step(waited_s=now - self._ready - step_s, step_s=step_s)

    async def _metrics(
        self, step: int, result: StepResult, trajectories: Sequence[Any], counts: QueueCounts
    ) -> dict[str, float]:
        ledger = {f"cluster/{name}": value for name, value in asdict(counts).items()}
        self._policy_lag_max = max(self._policy_lag_max, result.metrics["cluster/policy_lag_max"])
        self._session.run.update_summary({**asdict(counts), "policy_lag_max": self._policy_lag_max})
        self._of_tasks = task_metrics(self._session.config.tasks, trajectories, self._of_tasks)
        lengths = [trajectory.num_response_tokens for trajectory in trajectories]
        return {
            "step": step,
            "optimizer_step": self._num_optimizer_steps,
            "policy_version": step,
            "num_episodes": self._num_episodes,
            "rollout_actors/response_length_tokens": sum(lengths) / len(lengths),
            "reward_service/num_scorer_versions": len({trajectory.scorer_version for trajectory in trajectories}),
            **await self._session.rollout_metrics(),
            **ledger,
            f"learner/{NUM_RESTARTS}": self.learners.num_restarts,
            **self._of_tasks,
            **result.metrics,
        }

    def _is_kept(self, step: int) -> bool:
        config = self._session.config
        return self._is_evaluated(step) or step % config.learner.checkpoint_every_steps == 0

    def _is_evaluated(self, step: int) -> bool:
        config = self._session.config
        return step == config.learner.num_steps or step % config.evaluation.every_steps == 0

    async def _keep(self, step: int, counts: QueueCounts) -> None:
        """Write a checkpoint, and evaluate when it is time; the best, the newest two and those to keep stay."""
        config, run = self._session.config, self._session.run
        path = run.path / "checkpoints" / "ppo" / f"step-{step:06d}"
        num_trained = step * config.trajectory_queue.groups_per_step
        position = {"num_trained": num_trained, "num_void": counts.num_void}
        await self.learners.save_checkpoint(path, extra={POSITION: json.dumps(position)})
        best = self._is_evaluated(step) and await self._held_out.evaluate(step)
        every_steps = config.learner.keep_every_steps
        run.keep_checkpoints("ppo", newest=2, best=path if best else None, every_steps=every_steps)
