"""Evaluate the policy during training on held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Protocol

from cluster.trajectory import Segment, Trajectory
from deploy.evaluation.scoring import held_out_rows, mean_cost, score
from deploy.runtime.session import Session
from rollout_actors.conversations.conversation import Conversation


class ReferenceKl(Protocol):
    """Learners that compare the policy with its reference."""

    async def reference_kl(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """Return the KL to the reference policy summed over each response, in nats (k1 estimator)."""
        ...


class HeldOut:
    """Evaluates the newest version during PPO: mean reward and KL on a few held-out prompts of each task."""

    def __init__(self, session: Session, learners: ReferenceKl) -> None:
        self._session = session
        self._learners = learners
        self._constraint = session.config.learner.constraint
        self._rows: dict[str, list[dict[str, Any]]] = {}

    async def evaluate(self, step: int) -> bool:
        """Evaluate version `step`; returns whether its reward - kl_coefficient x KL is the highest so far.

        If the cost is bounded, a version within the bound ranks above any version beyond it. All tasks have the same
        weight.
        """
        by_task = {task: await self._evaluate_task(step, task) for task in self._session.config.by_task()}
        names = next(iter(by_task.values()))
        metrics = {"step": step, **{name: fmean(own[name] for own in by_task.values()) for name in names}}
        for task, own in by_task.items():
            metrics |= {f"tasks/{task}/{name}": value for name, value in own.items() if task}
        self._session.record("held_out", metrics)
        return self._is_best(metrics)

    async def _evaluate_task(self, step: int, task: str) -> dict[str, float]:
        """Return the metrics of version `step` on one task."""
        session, config = self._session, self._session.config
        if task not in self._rows:
            self._rows[task] = await held_out_rows(session, config.evaluation.num_prompts_during, task)
        rows = self._rows[task]
        groups = await session.pool.ask(
            "answer",
            rows,
            task=config.recorded_as(task),
            num=1,
            seed=f"{config.run.seed}-held-out",
            temperature=config.rollout_actors.temperature,
            min_policy_version=step,
        )
        conversations = [group[0] for group in groups]
        scores = await score(session, task, rows, conversations)
        records = [
            _record(i, step, conversation, score.reward)
            for i, (conversation, score) in enumerate(zip(conversations, scores, strict=True))
        ]
        kl_nats, reward_mean = fmean(await self._learners.reference_kl(records)), fmean(s.reward for s in scores)
        objective = reward_mean - config.learner.kl_coefficient * kl_nats
        cost = self._constraint.cost
        costs = {} if cost is None else {"cost_mean": mean_cost(scores, cost)}
        return {"reward_mean": reward_mean, "kl_nats": kl_nats, "objective": objective, **costs}

    def _is_best(self, metrics: dict[str, float]) -> bool:
        if not math.isfinite(metrics["objective"]):
            return False
        best = self._session.run.summary().get("held_out")
        if best is not None and self._rank(metrics) <= self._rank(best):
            return False
        summary = {f"held_out.{name.replace('/', '.')}": value for name, value in metrics.items()}
        self._session.run.update_summary(summary)
        return True

    def _rank(self, metrics: Mapping[str, float]) -> tuple[float, float]:
        """Return the sort key of a version: first the cost beyond its bound, negated, then the objective."""
        beyond = 0.0 if self._constraint.cost is None else metrics["cost_mean"] - self._constraint.max_mean
        return -max(0.0, beyond), metrics["objective"]


def _record(index: int, version: int, conversation: Conversation, reward: float) -> Trajectory:
    """Return a held-out conversation as a trajectory for the learners; it is never trained on."""
    return Trajectory(
        uid=f"held-out-{index}",
        group=0,
        task="held-out",
        token_ids=conversation.token_ids,
        mask=conversation.mask,
        behavior_logprobs=conversation.logprobs,
        segments=[Segment(version, turn.start, turn.length, 0, "held-out") for turn in conversation.turns],
        turns=conversation.turns,
        admission_index=0,
        finish_reason="stop",
        reward=reward,
        sequence_starts=conversation.sequence_starts,
    )
