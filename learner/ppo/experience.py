"""What the weights before a step make of its batch: rewards, advantages, returns and importance weights.

Computed once, constant over the epochs. Keeps what is steered from step to step (KL coefficient, the constraint's
multiplier, running statistics).
Knows neither optimiser nor networks; of other ranks only sums and maxima.

Shapes: B trajectories of this rank, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.errors import InputError, LearnerError
from learner.config import LearnerConfig
from learner.distributed.metrics import StepMetrics
from learner.distributed.ranks import Ranks
from learner.model.actor_critic import Outputs
from learner.ppo import advantages as adv
from learner.ppo import losses
from learner.ppo.batch import Batch
from learner.ppo.constraint import less_costs, rescaled, updated_multiplier
from learner.ppo.shaping import RunningMoments, normalized_scores, shaped_scores

MAX_LAG_SHOWN = 16
WHITENED = ("gae", "reinforce_pp", "reinforce_pp_baseline")


@dataclass(slots=True)
class Experience:
    """[B, T] each. `proximal`, `reference`, `values` and `entropy` are those of the weights before the step.

    `anchor` are the log-probabilities that the trust region is around, `importance` the tokens' weights. `graph` is
    the forward pass of the whole batch with its gradient graph, where the first optimiser step can use it.
    """

    batch: Batch
    proximal: Tensor
    reference: Tensor
    values: Tensor
    entropy: Tensor
    anchor: Tensor
    importance: Tensor
    advantages: Tensor
    returns: Tensor
    graph: Outputs | None


class Judge:
    """Fills in what an experience lacks. Every rank calls it for every step.

    `tasks` are the names of a run's tasks, the same on all ranks; none: everything is normalised together.
    """

    def __init__(self, config: LearnerConfig, ranks: Ranks, tasks: Sequence[str] = ()) -> None:
        self._config = config
        self._ranks = ranks
        self._tasks = tuple(tasks) if config.normalize_by == "task" else ()
        self._rewards = {task: RunningMoments() for task in self._tasks or ("",)}
        self.kl_coefficient = config.kl_coefficient
        self._is_constrained = config.constraint.cost is not None
        self.constraint_multiplier = config.constraint.initial_multiplier if self._is_constrained else 0.0

    def state(self) -> dict[str, Tensor]:
        """What a run that goes on must be given back, the same on all ranks."""
        coefficient = torch.tensor(self.kl_coefficient, dtype=torch.float64)
        multiplier = torch.tensor(self.constraint_multiplier, dtype=torch.float64)
        constraint = {"constraint_multiplier": multiplier} if self._is_constrained else {}
        moments = {_moments_of(task): moments.state() for task, moments in self._rewards.items()}
        return {"kl_coefficient": coefficient, **moments, **constraint}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave; a KL coefficient that is not steered is the settings'.

        Raises InputError where something lacks.
        """
        try:
            coefficient = float(state["kl_coefficient"])
            if self._config.kl_target is not None:
                self.kl_coefficient = coefficient
            for task, moments in self._rewards.items():
                moments.load(state[_moments_of(task)])
            if self._is_constrained:
                self.constraint_multiplier = float(state["constraint_multiplier"])
        except KeyError as error:
            raise InputError("learner", f"the checkpoint lacks {error}") from error

    def require_known(self, batch: Batch) -> None:
        """Raise LearnerError naming the trajectories of a task that is none of the run's."""
        unknown = [uid for uid, task in zip(batch.uids, batch.tasks, strict=True) if task not in self._tasks]
        if self._tasks and unknown:
            what = f"it is of none of the tasks {', '.join(self._tasks)}"
            raise LearnerError(f"trajectory {unknown[0]}", what, uids=unknown)

    def _parts(self, batch: Batch) -> dict[str, Tensor]:
        """[B] each: the rows that are normalised together, by the task that they are of."""
        names = [task if self._tasks else "" for task in batch.tasks]
        return {task: batch.ends.new_tensor([name == task for name in names]) for task in self._rewards}

    def steer_kl(self, kl_nats: float, num_episodes: int) -> None:
        """The next step's coefficient, the same on all ranks, because the mean KL is that of all."""
        target, horizon = self._config.kl_target, self._config.kl_horizon
        if target is not None:
            self.kl_coefficient = adv.adapted_kl_coefficient(
                self.kl_coefficient, kl_nats, target=target, horizon=horizon, num_episodes=num_episodes
            )

    def steer_multiplier(self, metrics: Mapping[str, float]) -> None:
        """The next step's multiplier, the same on all ranks, because the mean cost is that of all."""
        if self._is_constrained:
            cost_mean, settings = metrics["learner/cost_mean"], self._config.constraint
            self.constraint_multiplier = updated_multiplier(self.constraint_multiplier, cost_mean, settings)

    def judge(self, step: int, experience: Experience, tally: StepMetrics) -> None:
        """Importance weights, rewards, advantages and returns, by the statistics of all ranks; waits for them.

        What a stale token is charged for is the KL of the policy that is trained, not of the one that sampled it: with
        the importance weights that is the gradient of the KL there is. The logged KL is that of the sampling policy,
        of which the tokens are samples.
        """
        config, batch, mask = self._config, experience.batch, experience.batch.mask
        behavior = self._weigh(step, experience, tally)
        scores = batch.scores
        if config.normalize_rewards:
            parts = [(chosen, self._rewards[task]) for task, chosen in self._parts(batch).items()]
            scores = normalized_scores(scores, parts, self._ranks.all_sum)
        scores = shaped_scores(scores, lengths=mask.sum(1), ends=batch.ends, config=config)
        scores = less_costs(scores, batch.costs, self.constraint_multiplier)
        penalty = adv.KL_ESTIMATORS[config.kl_estimator](experience.anchor, experience.reference)
        coefficient = self.kl_coefficient if config.kl_in == "reward" else 0.0
        if config.advantages == "reinforce_pp_baseline":
            totals = scores + torch.where(mask, batch.turn_rewards, 0.0).sum(1)
            scores = scores - (totals - adv.group_advantages(totals, batch.groups, "dr_grpo"))
        rewards = adv.token_rewards(scores, penalty, mask, kl_coefficient=coefficient, turn_rewards=batch.turn_rewards)
        self._estimate_advantages(experience, rescaled(rewards, self.constraint_multiplier))
        explained = adv.explained_variance(experience.values, experience.returns, mask, self._ranks.all_sum)
        tally.constant("learner/explained_variance", explained)
        tally.constant("learner/kl_coefficient", self.kl_coefficient)
        if self._is_constrained:
            tally.constant("learner/constraint_multiplier", self.constraint_multiplier)
            tally.mean("learner/cost_mean", batch.costs)
        tally.mean("learner/reward_mean", batch.scores + torch.where(mask, batch.turn_rewards, 0.0).sum(1))
        tally.mean("learner/shaped_reward_mean", scores)
        kl = adv.kl_k1(behavior, experience.reference)
        tally.mean("learner/kl_nats", (kl * mask).sum(1))
        tally.mean("learner/kl_nats_per_token", kl[mask])
        tally.mean("learner/entropy_nats", experience.entropy[mask])

    def _weigh(self, step: int, experience: Experience, tally: StepMetrics) -> Tensor:
        """Anchor and importance weights; returns the log-probabilities that the tokens count as sampled with.

        Where every token of the step was sampled by the weights it starts from, the proximal log-probabilities stand
        for the behaviour ones, so that synchronous PPO does not hang on the engine's last bits.
        """
        config, batch, mask = self._config, experience.batch, experience.batch.mask
        lag = (step - 1 - batch.versions)[mask]
        max_lag = int(self._ranks.all_max(lag.max().double()))
        behavior = experience.proximal if max_lag == 0 else batch.behavior_logprobs
        experience.anchor = experience.proximal if config.decoupled else behavior
        experience.importance = losses.importance_weights(
            experience.anchor,
            behavior,
            mask,
            level=config.importance_level,
            cap=config.importance_cap,
            floor=config.importance_floor,
            outside=config.importance_outside,
        )
        self._tally_engine(step, experience, tally)
        self._tally_weights(experience.importance[mask], tally)
        tally.mean("cluster/policy_lag_mean", lag)
        tally.max("cluster/policy_lag_max", lag)
        for value in range(min(max_lag, MAX_LAG_SHOWN) + 1):
            tally.mean(f"cluster/policy_lag_share_{value}", (lag == value).double())
        return behavior

    def _tally_engine(self, step: int, experience: Experience, tally: StepMetrics) -> None:
        """How far the engine's log-probabilities are from the learner's, of tokens that the same weights sampled."""
        batch = experience.batch
        fresh = batch.mask & (batch.versions == step - 1)
        engine, own = batch.behavior_logprobs[fresh], experience.proximal[fresh]
        tally.mean("learner/engine_logprob_difference_mean", (engine - own).abs())
        tally.max("learner/engine_logprob_difference_max", (engine - own).abs())
        tally.mean("learner/engine_kl_nats_per_token", adv.kl_k3(engine, own))

    def _tally_weights(self, weights: Tensor, tally: StepMetrics) -> None:
        """Their mean, and the effective sample size (sum w)^2 / sum w^2 as a share of all tokens (Kong 1992)."""
        weights = weights.double()
        sums = torch.stack([weights.new_tensor(len(weights)), weights.sum(), weights.square().sum()])
        count, total, squares = self._ranks.all_sum(sums).tolist()
        tally.constant("learner/importance_weight_mean", total / count)
        tally.constant("learner/effective_sample_size", total**2 / (squares * count) if squares else 0.0)

    def _estimate_advantages(self, experience: Experience, rewards: Tensor) -> None:
        """By the critic, by rewards to come, or each response against its group, which no two ranks share."""
        config, mask = self._config, experience.batch.mask
        if config.advantages == "gae":
            self._estimate_by_critic(experience, rewards)
        elif config.advantages == "reinforce_pp" or config.advantages == "reinforce_pp_baseline":
            experience.advantages, _ = adv.gae(rewards, torch.zeros_like(rewards), mask, gamma=config.gamma, lam=1.0)
        else:
            whole = adv.group_advantages(rewards.sum(1), experience.batch.groups, config.advantages)
            experience.advantages = torch.where(mask, whole[:, None], 0.0)
        whiten = config.advantages in WHITENED if config.whiten_advantages is None else config.whiten_advantages
        if whiten:
            masks = [mask & chosen[:, None] for chosen in self._parts(experience.batch).values()]
            experience.advantages = adv.whiten_parts(experience.advantages, masks, self._ranks.all_sum)

    def _estimate_by_critic(self, experience: Experience, rewards: Tensor) -> None:
        config, mask = self._config, experience.batch.mask
        lam: float | Tensor = config.gae_lambda
        if config.gae_lambda_alpha is not None:
            lam = adv.length_adaptive_lambda(mask, config.gae_lambda_alpha)
        given = (rewards, experience.values, mask)
        experience.advantages, experience.returns = adv.gae(*given, gamma=config.gamma, lam=lam)
        if config.gae_value_lambda is not None:
            _, experience.returns = adv.gae(*given, gamma=config.gamma, lam=config.gae_value_lambda)


def _moments_of(task: str) -> str:
    """What the running statistics of a task's rewards are called in a checkpoint; of all rewards, without a task."""
    return f"reward_moments.{task}" if task else "reward_moments"
