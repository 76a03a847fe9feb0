"""From scores to advantages: token rewards, KL estimators, generalised advantage estimation, whitening.

Pure functions over tensors; knows no model, no rank and no RLlib. Where statistics must span all ranks, the caller
passes `all_sum`, which adds a tensor up over them.

Shapes: B trajectories, T tokens of the longest. `mask` [B, T] is true on tokens the policy sampled; what stands under
a false mask is ignored, whatever it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

AllSum = Callable[[Tensor], Tensor]
MAX_LOG_RATIO = 20.0


def _only_here(tensor: Tensor) -> Tensor:
    return tensor


class Moments(NamedTuple):
    """Count, mean and unbiased variance of the unmasked values, as float64 scalars."""

    count: Tensor
    mean: Tensor
    variance: Tensor


def kl_k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """log p - log q per token: unbiased, of either sign (k1 of Schulman 2020, "Approximating KL divergence")."""
    return logprobs - reference_logprobs


def kl_k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """(log p - log q)^2 / 2 per token: biased, never negative (k2 of Schulman 2020)."""
    return (logprobs - reference_logprobs).square() / 2


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """q / p - 1 - log(q / p) per token: unbiased, never negative (k3 of Schulman 2020).

    Log-ratios are held within MAX_LOG_RATIO, so that one absurd token cannot give infinity.
    """
    log_ratio = (reference_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def adapted_kl_coefficient(
    coefficient: float, kl_nats: float, *, target: float, horizon: float, num_episodes: int
) -> float:
    """The coefficient after a step of `num_episodes` with a mean KL of `kl_nats` per response.

    beta (1 + clip(KL / target - 1, -0.2, 0.2) num_episodes / horizon): arXiv:1909.08593, section 2.2.
    """
    error = min(max(kl_nats / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * num_episodes / horizon)


def token_rewards(
    scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coefficient: float, turn_rewards: Tensor | None = None
) -> Tensor:
    """Rewards [B, T]: -kl_coefficient * kl on every sampled token, the score [B] at the last one.

    `turn_rewards` [B, T] are immediate rewards, standing at the last token of their turn.
    """
    rewards = torch.where(mask, -kl_coefficient * kl, 0.0)
    if turn_rewards is not None:
        rewards = rewards + torch.where(mask, turn_rewards, 0.0)
    return rewards + torch.where(last_unmasked(mask), scores[:, None].to(rewards.dtype), 0.0)


def last_unmasked(mask: Tensor) -> Tensor:
    """True [B, T] at each row's last true token; nowhere in a row that has none."""
    behind = mask.flip(1).cumsum(1).flip(1)
    return mask & (behind == 1)


def length_adaptive_lambda(mask: Tensor, alpha: float) -> Tensor:
    """Lambda [B] of each row: 1 - 1 / (alpha n) for n sampled tokens, not below 0 (VAPO, arXiv:2504.05118, eq. 9)."""
    return (1 - 1 / (alpha * mask.sum(1).clamp(min=1))).clamp(min=0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float | Tensor) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B, T] by generalised advantage estimation (arXiv:1506.02438, eq. 16); `lam` may be [B].

    A_t = delta_t + gamma * lam * A_next with delta_t = r_t + gamma * V_next - V_t, where "next" is the next *sampled*
    token: both accumulators are carried unchanged across masked gaps (another speaker's turn). With values of 0 and
    lam = 1 the advantages are the discounted rewards to come.
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
    """Advantages [B] of whole responses with rewards [B] over the others of their group; `groups` [B] are its numbers.

    With n rewards r of a group, their mean m and unbiased deviation s: `grpo` (r - m) / (s + 1e-6), the outcome
    supervision of arXiv:2402.03300; `dr_grpo` r - m (arXiv:2503.20783); `rloo` (r - m) n / (n - 1), which is r minus
    the mean of the *other* n - 1 (arXiv:2402.14740, eq. 8). Equal rewards, and a group of one, give 0.
    """
    _, place = groups.unique(return_inverse=True)

    def group_sum(values: Tensor) -> Tensor:
        return values.new_zeros(len(values)).index_add(0, place, values)[place]

    count = group_sum(torch.ones_like(rewards))
    centred = rewards - group_sum(rewards) / count
    others = (count - 1).clamp(min=1)
    if estimator == "dr_grpo":
        return centred
    if estimator == "rloo":
        return centred * count / others
    return centred / ((group_sum(centred.square()) / others).sqrt() + 1e-6)


def masked_moments(values: Tensor, mask: Tensor, all_sum: AllSum = _only_here) -> Moments:
    """Moments of the unmasked values of all ranks; the variance of fewer than two values is 0."""
    chosen = values.detach()[mask].double()
    count, total = all_sum(torch.stack([mask.sum().double(), chosen.sum()])).unbind()
    mean = total / count.clamp(min=1)
    variance = all_sum((chosen - mean).square().sum()) / (count - 1).clamp(min=1)
    return Moments(count, mean, variance)


def whiten(values: Tensor, mask: Tensor, moments: Moments) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) on the unmasked values, 0 elsewhere."""
    scale = (moments.variance + 1e-8).rsqrt().to(values.dtype)
    return torch.where(mask, (values - moments.mean.to(values.dtype)) * scale, 0.0)


def whiten_parts(values: Tensor, masks: Sequence[Tensor], all_sum: AllSum = _only_here) -> Tensor:
    """Values [B, T] whitened under each mask by the moments of what is under it on all ranks; 0 under none of them.

    The masks do not overlap.
    """
    whitened = torch.zeros_like(values)
    for mask in masks:
        whitened = torch.where(mask, whiten(values, mask, masked_moments(values, mask, all_sum)), whitened)
    return whitened


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, all_sum: AllSum = _only_here) -> float:
    """1 - Var(returns - values) / Var(returns); 0 where the returns do not vary."""
    total = float(masked_moments(returns, mask, all_sum).variance)
    residual = float(masked_moments(returns - values, mask, all_sum).variance)
    return 1.0 - residual / total if total > 0 else 0.0
