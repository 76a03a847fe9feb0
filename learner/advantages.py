"""From scores to advantages: token rewards, KL estimators, generalised advantage estimation, whitening.

Pure functions over tensors; knows no model, no rank and no RLlib. Where statistics must span all ranks, the caller
passes `all_sum`, which adds a tensor up over them.

Shapes: B trajectories, T tokens of the longest. `mask` [B, T] is true on tokens the policy sampled; what stands under
a false mask is ignored, whatever it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

AllSum = Callable[[Tensor], Tensor]


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
    """q / p - 1 - log(q / p) per token: unbiased, never negative (k3 of Schulman 2020)."""
    log_ratio = reference_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


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


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B, T] by generalised advantage estimation (arXiv:1506.02438, eq. 16).

    A_t = delta_t + gamma * lam * A_next with delta_t = r_t + gamma * V_next - V_t, where "next" is the next *sampled*
    token: both accumulators are carried unchanged across masked gaps (another speaker's turn).
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


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, all_sum: AllSum = _only_here) -> float:
    """1 - Var(returns - values) / Var(returns); 0 where the returns do not vary."""
    total = float(masked_moments(returns, mask, all_sum).variance)
    residual = float(masked_moments(returns - values, mask, all_sum).variance)
    return 1.0 - residual / total if total > 0 else 0.0
