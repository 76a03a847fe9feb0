"""Turns scores into advantages: KL estimators, token rewards, advantage estimators, whitening.

Pure functions over tensors. For statistics over all ranks the caller passes `all_sum`, which sums a tensor over them.
To add an estimator, write a function of `Signals`, register it in FUNCTIONS and declare its needs in
`learner.estimators`.

Shapes: B trajectories, T tokens of the longest. `mask` [B, T] is true on tokens that the policy sampled; values under
a false mask are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cluster.errors import LearnerError
from cluster.registry import Registry
from cluster.trajectory import ROUNDING
from learner import estimators
from learner.config import LearnerConfig

AllSum = Callable[[Tensor], Tensor]
MAX_LOG_RATIO = 20.0


def _this_rank_only(tensor: Tensor) -> Tensor:
    return tensor


class Moments(NamedTuple):
    """Count, mean and unbiased variance of the unmasked values, as float64 scalars."""

    count: Tensor
    mean: Tensor
    variance: Tensor


def kl_k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Compute log p - log q per token: unbiased, of either sign (k1, Schulman 2020)."""
    return logprobs - reference_logprobs


def kl_k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Compute (log p - log q)^2 / 2 per token: biased, never negative (k2, Schulman 2020)."""
    return (logprobs - reference_logprobs).square() / 2


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Compute q / p - 1 - log(q / p) per token: unbiased, never negative (k3, Schulman 2020).

    Log-ratios are clamped to MAX_LOG_RATIO, so that a single extreme token cannot give infinity.
    """
    log_ratio = (reference_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def adapted_kl_coefficient(
    coefficient: float, kl_nats: float, *, target: float, horizon: float, num_episodes: int
) -> float:
    """Adapt the KL coefficient after a step of `num_episodes` with a mean KL of `kl_nats` per response.

    beta (1 + clip(KL / target - 1, -0.2, 0.2) num_episodes / horizon): arXiv:1909.08593, section 2.2.
    """
    error = min(max(kl_nats / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * num_episodes / horizon)


def token_rewards(
    scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coefficient: float, turn_rewards: Tensor | None = None
) -> Tensor:
    """Compute rewards [B, T]: -kl_coefficient * kl on every sampled token, the score [B] at the last one.

    `turn_rewards` [B, T] are immediate rewards, each at the last token of its turn.
    """
    rewards = torch.where(mask, -kl_coefficient * kl, 0.0)
    if turn_rewards is not None:
        rewards = rewards + torch.where(mask, turn_rewards, 0.0)
    return rewards + torch.where(last_unmasked(mask), scores[:, None].to(rewards.dtype), 0.0)


def last_unmasked(mask: Tensor) -> Tensor:
    """Mark each row's last true token [B, T]; none in a row without one."""
    behind = mask.flip(1).cumsum(1).flip(1)
    return mask & (behind == 1)


def length_adaptive_lambda(mask: Tensor, alpha: float) -> Tensor:
    """Compute VAPO's lambda [B] (arXiv:2504.05118, eq. 9): 1 - 1 / (alpha n) for n tokens, at least 0."""
    return (1 - 1 / (alpha * mask.sum(1).clamp(min=1))).clamp(min=0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float | Tensor) -> tuple[Tensor, Tensor]:
    """Compute generalised advantages and returns [B, T] (arXiv:1506.02438, eq. 16); `lam` may be [B].

    A_t = delta_t + gamma * lam * A_next with delta_t = r_t + gamma * V_next - V_t. Here "next" is the next *sampled*
    token: both accumulators are carried unchanged across masked gaps (another speaker's turn). With values of 0 and
    lam = 1 the advantages are the discounted returns.
    """
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(next_value)
    for t in range(values.shape[1] - 1, -1, -1):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_value = torch.where(here, values[:, t], next_value)
        next_advantage = torch.where(here, advantage, next_advantage)
        advantages[:, t] = torch.where(here, advantage, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def group_advantages(rewards: Tensor, groups: Tensor, estimator: Literal["grpo", "dr_grpo", "rloo"]) -> Tensor:
    """Compute advantages [B] of whole responses with rewards [B] relative to their group.

    `groups` [B] are the groups' numbers.

    With n rewards r of a group, their mean m and unbiased deviation s: `grpo` (r - m) / (s + 1e-6), the outcome
    supervision of arXiv:2402.03300; `dr_grpo` r - m (arXiv:2503.20783); `rloo` (r - m) n / (n - 1), which is r minus
    the mean of the *other* n - 1 (arXiv:2402.14740, eq. 8). Rewards that differ by no more than rounding, and a group
    of one, give exactly 0.
    """
    _, place = groups.unique(return_inverse=True)

    def group_sum(values: Tensor) -> Tensor:
        return values.new_zeros(len(values)).index_add(0, place, values)[place]

    count = group_sum(torch.ones_like(rewards))
    centred = torch.where(equal_in_group(rewards, groups), 0.0, rewards - group_sum(rewards) / count)
    others = (count - 1).clamp(min=1)
    if estimator == "dr_grpo":
        return centred
    if estimator == "rloo":
        return centred * count / others
    return centred / ((group_sum(centred.square()) / others).sqrt() + 1e-6)


def equal_in_group(rewards: Tensor, groups: Tensor) -> Tensor:
    """Mark the responses [B] whose group's rewards differ by no more than rounding."""
    _, place = groups.unique(return_inverse=True)

    def group_max(values: Tensor) -> Tensor:
        lowest = torch.full_like(values, -torch.inf)
        return lowest.scatter_reduce(0, place, values, "amax")[place]

    return group_max(rewards) + group_max(-rewards) <= ROUNDING * group_max(rewards.abs())


def masked_moments(values: Tensor, mask: Tensor, all_sum: AllSum = _this_rank_only) -> Moments:
    """Compute moments of the unmasked values of all ranks; the variance of fewer than two values is 0."""
    chosen = values.detach()[mask].double()
    count, total = all_sum(torch.stack([mask.sum().double(), chosen.sum()])).unbind()
    mean = total / count.clamp(min=1)
    variance = all_sum((chosen - mean).square().sum()) / (count - 1).clamp(min=1)
    return Moments(count, mean, variance)


def whiten(values: Tensor, mask: Tensor, moments: Moments) -> Tensor:
    """Whiten the unmasked values: (x - mean) / sqrt(variance + 1e-8); 0 elsewhere, and if they differ by rounding."""
    is_constant = moments.variance.sqrt() <= ROUNDING * moments.mean.abs()
    scale = torch.where(is_constant, 0.0, (moments.variance + 1e-8).rsqrt()).to(values.dtype)
    return torch.where(mask, (values - moments.mean.to(values.dtype)) * scale, 0.0)


def whiten_parts(values: Tensor, masks: Sequence[Tensor], all_sum: AllSum = _this_rank_only) -> Tensor:
    """Whiten values [B, T] under each mask separately, by moments over all ranks; 0 outside all masks.

    The masks must not overlap.
    """
    whitened = torch.zeros_like(values)
    for mask in masks:
        whitened = torch.where(mask, whiten(values, mask, masked_moments(values, mask, all_sum)), whitened)
    return whitened


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, all_sum: AllSum = _this_rank_only) -> float:
    """Compute 1 - Var(returns - values) / Var(returns); 0 if the returns do not vary."""
    total = float(masked_moments(returns, mask, all_sum).variance)
    residual = float(masked_moments(returns - values, mask, all_sum).variance)
    return 1.0 - residual / total if total > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Signals:
    """The input of an advantage estimator.

    `rewards` [B, T] are token rewards including the KL penalty, `values` [B, T] the critic's (0 without one), `groups`
    [B] the numbers of the prompts. All responses to a prompt are on the same rank.
    """

    rewards: Tensor
    values: Tensor
    mask: Tensor
    groups: Tensor
    config: LearnerConfig


Function = Callable[[Signals], Tensor | tuple[Tensor, Tensor]]
FUNCTIONS: Registry[Function] = Registry("advantage estimator")


@FUNCTIONS.register("gae")
def _gae(signals: Signals) -> tuple[Tensor, Tensor]:
    """Estimate by the critic, with the settings' lambdas (generalised advantage estimation)."""
    config, lam = signals.config, signals.config.gae_lambda
    advantage_lam = lam if config.gae_lambda_alpha is None else _adaptive(signals)
    rewards, values, mask, gamma = signals.rewards, signals.values, signals.mask, config.gamma
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=advantage_lam)
    if config.gae_value_lambda is not None:
        _, returns = gae(rewards, values, mask, gamma=gamma, lam=config.gae_value_lambda)
    return advantages, returns


def _adaptive(signals: Signals) -> Tensor:
    assert signals.config.gae_lambda_alpha is not None
    return length_adaptive_lambda(signals.mask, signals.config.gae_lambda_alpha)


@FUNCTIONS.register("reinforce_pp_baseline")
@FUNCTIONS.register("reinforce_pp")
def _rewards_to_come(signals: Signals) -> Tensor:
    """Compute discounted rewards from each token on (REINFORCE++, arXiv:2501.03262)."""
    zeros = torch.zeros_like(signals.rewards)
    return gae(signals.rewards, zeros, signals.mask, gamma=signals.config.gamma, lam=1.0)[0]


def _against_group(estimator: Literal["grpo", "dr_grpo", "rloo"]) -> Callable[[Signals], Tensor]:
    """Make an estimator that gives every token of a response its `group_advantages`."""

    def estimate(signals: Signals) -> Tensor:
        whole = group_advantages(signals.rewards.sum(1), signals.groups, estimator)
        return torch.where(signals.mask, whole[:, None], 0.0)

    return estimate


FUNCTIONS.register("grpo")(_against_group("grpo"))
FUNCTIONS.register("dr_grpo")(_against_group("dr_grpo"))
FUNCTIONS.register("rloo")(_against_group("rloo"))


def group_means(totals: Tensor, groups: Tensor) -> Tensor:
    """Compute the mean [B] of the total rewards [B] in each response's group."""
    return totals - group_advantages(totals, groups, "dr_grpo")


@dataclass(frozen=True, slots=True)
class Estimator:
    """An advantage estimator: `function` returns advantages, with a critic also returns, [B, T] each.

    `baseline(totals, groups)` [B] is subtracted from the scores before token rewards are made.
    """

    function: Function
    needs: estimators.Needs
    baseline: Callable[[Tensor, Tensor], Tensor] | None = None

    def estimate(self, signals: Signals) -> tuple[Tensor, Tensor]:
        """Compute advantages and returns; returns are 0 without a critic.

        Raises LearnerError if the function returned something else.
        """
        result = self.function(signals)
        pair = result if self.needs.critic else (result, torch.zeros_like(signals.values))
        if not isinstance(pair, tuple) or [getattr(part, "shape", None) for part in pair] != [signals.mask.shape] * 2:
            expected = "advantages and returns" if self.needs.critic else "advantages"
            raise LearnerError(estimators.KEY, f"it must return {expected} of shape {tuple(signals.mask.shape)}")
        return pair


BASELINES = {"reinforce_pp_baseline": group_means}


def find_estimator(name: str) -> Estimator:
    """Find a registered estimator, or the function at a dotted path. Raises InputError if there is none."""
    function = FUNCTIONS.find(name, key=estimators.KEY)
    return Estimator(function, estimators.needs_of(name), BASELINES.get(name))
