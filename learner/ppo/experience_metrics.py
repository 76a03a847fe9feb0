"""Adds the metrics of an experience to those of its step."""

from __future__ import annotations

import torch
from torch import Tensor

from learner.distributed.metrics import StepMetrics
from learner.distributed.ranks import Ranks
from learner.ppo import advantages as adv
from learner.ppo.experience import AdvantageComputer, Experience

MAX_LAG_SHOWN = 16


def log_experience(
    step: int, experience: Experience, computer: AdvantageComputer, ranks: Ranks, metrics: StepMetrics
) -> None:
    """Add rewards, KL, entropy, lag and importance weights of a step's experience. Collective."""
    explained = adv.explained_variance(experience.values, experience.returns, experience.batch.mask, ranks.all_sum)
    metrics.constant("learner/explained_variance", explained)
    metrics.constant("learner/kl_coefficient", computer.kl_coefficient)
    if computer.is_constrained:
        metrics.constant("learner/constraint_multiplier", computer.constraint_multiplier)
        metrics.mean("learner/cost_mean", experience.batch.costs)
    _log_rewards(experience, metrics)
    _log_engine(step, experience, metrics)
    _log_importance(experience, ranks, metrics)
    _log_lag(step, experience, metrics)


def _log_rewards(experience: Experience, metrics: StepMetrics) -> None:
    """Add rewards, entropy, and the KL of the sampling policy, which the tokens are samples of."""
    batch, mask = experience.batch, experience.batch.mask
    metrics.mean("learner/reward_mean", batch.scores + torch.where(mask, batch.turn_rewards, 0.0).sum(1))
    metrics.mean("learner/shaped_reward_mean", experience.shaped_scores)
    kl = adv.kl_k1(experience.behavior, experience.reference)
    metrics.mean("learner/kl_nats", (kl * mask).sum(1))
    metrics.mean("learner/kl_nats_per_token", kl[mask])
    metrics.mean("learner/entropy_nats", experience.entropy[mask])


def _log_engine(step: int, experience: Experience, metrics: StepMetrics) -> None:
    """Add the difference of engine and learner log-probabilities on tokens of the same weights."""
    batch = experience.batch
    fresh = batch.mask & (batch.versions == step - 1)
    engine, own = batch.behavior_logprobs[fresh], experience.proximal[fresh]
    metrics.mean("learner/engine_logprob_difference_mean", (engine - own).abs())
    metrics.max("learner/engine_logprob_difference_max", (engine - own).abs())
    metrics.mean("learner/engine_kl_nats_per_token", adv.kl_k3(engine, own))


def _log_importance(experience: Experience, ranks: Ranks, metrics: StepMetrics) -> None:
    """Add the mean importance weight and the effective sample size.

    The latter is (sum w)^2 / sum w^2, per token (Kong 1992).
    """
    weights: Tensor = experience.importance[experience.batch.mask].double()
    sums = torch.stack([weights.new_tensor(len(weights)), weights.sum(), weights.square().sum()])
    count, total, squares = ranks.all_sum(sums).tolist()
    metrics.constant("learner/importance_weight_mean", total / count)
    metrics.constant("learner/effective_sample_size", total**2 / (squares * count) if squares else 0.0)


def _log_lag(step: int, experience: Experience, metrics: StepMetrics) -> None:
    """Add the mean, maximum and distribution of how many versions old the tokens are."""
    lag = (step - 1 - experience.batch.versions)[experience.batch.mask]
    metrics.mean("cluster/policy_lag_mean", lag)
    metrics.max("cluster/policy_lag_max", lag)
    for value in range(min(experience.max_lag, MAX_LAG_SHOWN) + 1):
        metrics.mean(f"cluster/policy_lag_share_{value}", (lag == value).double())
