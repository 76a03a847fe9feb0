"""Reports the steps of a PPO run: trajectory files, metrics rows, summary and notes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from cluster.ledger import QueueCounts
from cluster.trajectory import Trajectory, write_trajectories
from deploy.ring.batch_metrics import ConstantReward, batch_metrics
from deploy.ring.healing import NUM_RESTARTS, RestartingLearners
from deploy.ring.resuming import Resumption
from deploy.runtime.session import Session
from learner.config import LearnerConfig
from learner.training_loop import Groups, StepResult


class StepReport:
    """Writes what each step produced; continues the counts of the steps before a restart.

    `started` is the stage's start on the monotonic clock.
    """

    def __init__(self, session: Session, resumed: Resumption, learners: RestartingLearners, *, started: float) -> None:
        last = session.run.last_ppo_step()
        self._session = session
        self._resumed = resumed
        self._learners = learners
        self._started = self._ready = started
        self._last_row: int = last.get("step", 0)
        self._num_episodes: int = last.get("num_episodes", 0)
        self._num_optimizer_steps: int = last.get("optimizer_step", 0)
        self._task_metrics = {key: value for key, value in last.items() if key.startswith("tasks/")}
        self._policy_lag_max = session.run.summary().get("policy_lag_max", 0.0)
        self._num_noted_void = 0
        self._constant_reward = ConstantReward(session.config.learner.num_steps)

    def ready(self) -> None:
        """Record that every part has started and the first version is published."""
        self._ready = time.monotonic()
        self._session.run.update_summary({"ready_s": self._ready - self._started})
        self._session.view.wait_for("first responses")

    def seconds(self) -> float:
        """Return the seconds since the stage started."""
        return time.monotonic() - self._started

    def step_done(self, step: int, result: StepResult) -> None:
        """Record the time to the first step that this command trained."""
        if step != self._resumed.trained + 1:
            return
        now, step_s = time.monotonic(), result.metrics["learner/step_s"]
        self._session.run.update_summary({"first_ppo_step_s": now - self._started})
        self._session.start_up.first_step(waited_s=now - self._ready - step_s, step_s=step_s)

    def note_void(self, voided: Sequence[tuple[str, str]]) -> None:
        """Print a note for each voided group (uid, reason) that has none yet."""
        for uid, reason in voided[self._num_noted_void :]:
            self._session.view.note(f"the group of {uid} is void: {reason}")
        self._num_noted_void = max(self._num_noted_void, len(voided))

    def num_unnoted_void(self, counts: QueueCounts) -> int:
        """Return how many groups this command voided without a note so far."""
        before = self._resumed.standing
        num = counts.num_void - counts.num_resampled - (before.num_void - before.num_resampled)
        return num - self._num_noted_void

    async def write(self, step: int, groups: Groups, result: StepResult, time_s: float, counts: QueueCounts) -> None:
        """Write the step's trajectories and metrics row, unless they were written before the restart."""
        session = self._session
        if step <= self._last_row:
            session.view.step({"step": step, **result.metrics})
            return
        trajectories = [trajectory for group in groups for trajectory in group]
        path = session.run.path / "trajectories" / f"step-{step:06d}.arrow"
        await asyncio.to_thread(write_trajectories, path, trajectories)
        self._num_episodes += len(trajectories)
        self._num_optimizer_steps += result.num_optimizer_steps
        if note := short_step_note(self._session.config.learner, step, result.num_optimizer_steps):
            session.view.note(note)
        if note := self._constant_reward.after_step(step, trajectories):
            session.view.note(note)
        self._update_summary(result, counts)
        session.log_step("ppo", await self._row(step, result, groups, counts) | {"time_s": time_s})
        session.run.update_status(step=step)

    def _update_summary(self, result: StepResult, counts: QueueCounts) -> None:
        self._policy_lag_max = max(self._policy_lag_max, result.metrics["cluster/policy_lag_max"])
        self._session.run.update_summary({**asdict(counts), "policy_lag_max": self._policy_lag_max})

    async def _row(self, step: int, result: StepResult, groups: Groups, counts: QueueCounts) -> dict[str, Any]:
        trajectories = [trajectory for group in groups for trajectory in group]
        self._task_metrics = task_metrics(self._session.config.tasks, trajectories, self._task_metrics)
        return {
            "step": step,
            "optimizer_step": self._num_optimizer_steps,
            "policy_version": step,
            "num_episodes": self._num_episodes,
            **batch_metrics(groups),
            "reward_service/num_scorer_versions": len({t.scorer_version for t in trajectories}),
            **await self._session.rollout_metrics(),
            **{f"cluster/{name}": value for name, value in asdict(counts).items()},
            f"learner/{NUM_RESTARTS}": self._learners.num_restarts,
            **self._task_metrics,
            **result.metrics,
        }


def short_step_note(learner: LearnerConfig, step: int, num_done: int) -> str | None:
    """Return the note on a step that took fewer optimizer steps than the settings ask for, or None."""
    num, limit = learner.num_epochs * learner.num_minibatches, learner.max_step_kl_nats
    if num_done >= num:
        return None
    if not num_done and learner.zero_variance_groups == "skip":
        return f"step {step} trained nothing: the responses to each prompt had equal rewards"
    reason = "" if limit is None else f", beyond learner.max_step_kl_nats = {limit:g}"
    return f"step {step} ended after {num_done} of {num} optimiser steps{reason}"


def task_metrics(
    tasks: Iterable[str], trajectories: Sequence[Trajectory], before: Mapping[str, float]
) -> dict[str, float]:
    """Return a step's metrics of each task under `tasks/NAME/...`, given those of the step `before`.

    A task without a trajectory in the step has only its number of episodes so far.
    """
    metrics: dict[str, float] = {}
    for task in tasks:
        own, key = [trajectory for trajectory in trajectories if trajectory.task == task], f"tasks/{task}"
        metrics[f"{key}/num_episodes"] = before.get(f"{key}/num_episodes", 0) + len(own)
        if own:
            metrics[f"{key}/reward_mean"] = fmean(trajectory.total_reward for trajectory in own)
            metrics[f"{key}/response_length_tokens"] = fmean(trajectory.num_response_tokens for trajectory in own)
    return metrics
