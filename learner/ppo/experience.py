"""Computes a step's rewards, advantages, returns and importance weights before it trains.

They are constant over the epochs. `AdvantageComputer` also keeps what changes from step to step: the KL coefficient,
the constraint's multiplier and running statistics.

Shapes: B trajectories of this rank, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.errors import InputError, LearnerError
from learner.config import LearnerConfig
from learner.distributed.ranks import Ranks
from learner.ppo import advantages as adv
from learner.ppo import losses
from learner.ppo.batch import Batch
from learner.ppo.constraint import less_costs, rescaled, updated_multiplier
from learner.ppo.shaping import RunningMoments, normalized_scores, shaped_scores


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What the networks computed for a batch before the step, [B, T] each.

    Values are 0 if the batch's mask is false.

    `proximal` and `reference` are log-probabilities of the policy and of the reference policy.
    """

    batch: Batch
    proximal: Tensor
    reference: Tensor
    values: Tensor
    entropy: Tensor


@dataclass(frozen=True, slots=True)
class Experience(Evaluation):
    """A batch ready to train on, [B, T] each.

    `behavior` are the log-probabilities of the policy that counts as the sampling one, `anchor` those that the trust
    region is around, `importance` the tokens' weights. `shaped_scores` [B] are the scores that rewards are made of.
    `max_lag` is the largest number of versions that any rank's token is old.
    """

    behavior: Tensor
    anchor: Tensor
    importance: Tensor
    advantages: Tensor
    returns: Tensor
    shaped_scores: Tensor
    max_lag: int


class AdvantageComputer:
    """Computes the experience of each step. Collective: call `compute` on every rank.

    `tasks` are the names of a run's tasks, the same on all ranks; if empty, everything is normalised together.
    """

    def __init__(self, config: LearnerConfig, ranks: Ranks, tasks: Sequence[str] = ()) -> None:
        self._config = config
        self._ranks = ranks
        self._tasks = tuple(tasks) if config.normalize_by == "task" else ()
        self._rewards = {task: RunningMoments() for task in self._tasks or ("",)}
        self._estimator = adv.find_estimator(config.advantages)
        self.kl_coefficient = config.kl_coefficient
        self.is_constrained = config.constraint.cost is not None
        self.constraint_multiplier = config.constraint.initial_multiplier if self.is_constrained else 0.0

    def use(self, config: LearnerConfig) -> None:
        """Switch to settings that a run may change; an adapted KL coefficient stays, a constant one is replaced."""
        if config != self._config and config.kl_target is None:
            self.kl_coefficient = config.kl_coefficient
        self._config = config

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run needs; equal on all ranks."""
        coefficient = torch.tensor(self.kl_coefficient, dtype=torch.float64)
        multiplier = torch.tensor(self.constraint_multiplier, dtype=torch.float64)
        constraint = {"constraint_multiplier": multiplier} if self.is_constrained else {}
        moments = {_moments_name(task): moments.state() for task, moments in self._rewards.items()}
        return {"kl_coefficient": coefficient, **moments, **constraint}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned; a KL coefficient that is not adapted comes from the settings.

        Raises InputError naming a missing entry.
        """
        try:
            coefficient = float(state["kl_coefficient"])
            if self._config.kl_target is not None:
                self.kl_coefficient = coefficient
            for task, moments in self._rewards.items():
                moments.load(state[_moments_name(task)])
            if self.is_constrained:
                self.constraint_multiplier = float(state["constraint_multiplier"])
        except KeyError as error:
            raise InputError("learner", f"the checkpoint lacks {error}") from error

    def require_known(self, batch: Batch) -> None:
        """Raise LearnerError naming the trajectories whose task is not one of the run's."""
        unknown = [uid for uid, task in zip(batch.uids, batch.tasks, strict=True) if task not in self._tasks]
        if self._tasks and unknown:
            problem = f"its task is none of {', '.join(self._tasks)}"
            raise LearnerError(f"trajectory {unknown[0]}", problem, uids=unknown)

    def steer_kl(self, kl_nats: float, num_episodes: int) -> None:
        """Adapt the KL coefficient for the next step to this step's mean KL over all ranks."""
        target, horizon = self._config.kl_target, self._config.kl_horizon
        if target is not None:
            self.kl_coefficient = adv.adapted_kl_coefficient(
                self.kl_coefficient, kl_nats, target=target, horizon=horizon, num_episodes=num_episodes
            )

    def steer_multiplier(self, metrics: Mapping[str, float]) -> None:
        """Update the constraint's multiplier for the next step by this step's mean cost over all ranks."""
        if self.is_constrained:
            cost_mean, settings = metrics["learner/cost_mean"], self._config.constraint
            self.constraint_multiplier = updated_multiplier(self.constraint_multiplier, cost_mean, settings)

    def compute(self, step: int, evaluation: Evaluation) -> Experience:
        """Compute importance weights, rewards, advantages and returns, with statistics over all ranks.

        The KL penalty of a stale token is that of the policy being trained, not of the one that sampled it: with the
        importance weights this is the gradient of the trained policy's KL.
        """
        config, batch = self._config, evaluation.batch
        behavior, max_lag = self._behavior(step, evaluation)
        anchor = evaluation.proximal if config.decoupled else behavior
        importance = losses.importance_weights(
            anchor,
            behavior,
            batch.mask,
            level=config.importance_level,
            cap=config.importance_cap,
            floor=config.importance_floor,
            outside=config.importance_outside,
        )
        scores = self._shaped_scores(batch)
        penalty = adv.KL_ESTIMATORS[config.kl_estimator](anchor, evaluation.reference)
        coefficient = self.kl_coefficient if config.kl_in == "reward" else 0.0
        rewards = adv.token_rewards(
            scores, penalty, batch.mask, kl_coefficient=coefficient, turn_rewards=batch.turn_rewards
        )
        advantages, returns = self._estimate(evaluation, rescaled(rewards, self.constraint_multiplier))
        return Experience(
            batch=batch,
            proximal=evaluation.proximal,
            reference=evaluation.reference,
            values=evaluation.values,
            entropy=evaluation.entropy,
            behavior=behavior,
            anchor=anchor,
            importance=importance,
            advantages=advantages,
            returns=returns,
            shaped_scores=scores,
            max_lag=max_lag,
        )

    def _behavior(self, step: int, evaluation: Evaluation) -> tuple[Tensor, int]:
        """Return the sampling policy's log-probabilities and the largest lag over all ranks.

        If the weights before the step sampled every token, these are the proximal ones, so that synchronous PPO does
        not depend on the engine's rounding.
        """
        batch = evaluation.batch
        lag = (step - 1 - batch.versions)[batch.mask]
        max_lag = int(self._ranks.all_max(lag.max().double()))
        return evaluation.proximal if max_lag == 0 else batch.behavior_logprobs, max_lag

    def _shaped_scores(self, batch: Batch) -> Tensor:
        """Normalise and shape the scores [B], subtract the costs and the estimator's baseline."""
        config, scores = self._config, batch.scores
        if config.normalize_rewards:
            parts = [(chosen, self._rewards[task]) for task, chosen in self._parts(batch).items()]
            scores = normalized_scores(scores, parts, self._ranks.all_sum)
        scores = shaped_scores(scores, lengths=batch.mask.sum(1), ends=batch.ends, config=config)
        scores = less_costs(scores, batch.costs, self.constraint_multiplier)
        if self._estimator.baseline is None:
            return scores
        totals = scores + torch.where(batch.mask, batch.turn_rewards, 0.0).sum(1)
        return scores - self._estimator.baseline(totals, batch.groups)

    def _estimate(self, evaluation: Evaluation, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Estimate advantages and returns of token rewards; whiten the advantages if the settings ask for it."""
        config, batch = self._config, evaluation.batch
        signals = adv.Signals(rewards, evaluation.values, batch.mask, batch.groups, config)
        advantages, returns = self._estimator.estimate(signals)
        whitens = self._estimator.needs.whitens if config.whiten_advantages is None else config.whiten_advantages
        if whitens:
            trained = trained_rows(batch, config)
            masks = [batch.mask & (chosen & trained)[:, None] for chosen in self._parts(batch).values()]
            advantages = adv.whiten_parts(advantages, masks, self._ranks.all_sum)
        return advantages, returns

    def _parts(self, batch: Batch) -> dict[str, Tensor]:
        """Return by task a mask [B] of the rows that are normalised together."""
        names = [task if self._tasks else "" for task in batch.tasks]
        return {task: batch.ends.new_tensor([name == task for name in names]) for task in self._rewards}


def trained_rows(batch: Batch, config: LearnerConfig) -> Tensor:
    """Mark the rows [B] that the loss is over: all, or only those of groups whose rewards differ."""
    if config.zero_variance_groups != "skip":
        return torch.ones_like(batch.ends)
    totals = batch.scores + torch.where(batch.mask, batch.turn_rewards, 0.0).sum(1)
    return ~adv.equal_in_group(totals, batch.groups)


def _moments_name(task: str) -> str:
    """Name the running statistics of a task's rewards in a checkpoint.

    Without a task, name the statistics of all rewards.
    """
    return f"reward_moments.{task}" if task else "reward_moments"
