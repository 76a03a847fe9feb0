"""PPO's losses, token by token, and how tokens become one number.

Pure functions over tensors; knows no model, no rank and no RLlib. Every function takes tensors of one shape, `[B, T]`
(B trajectories, T tokens of the longest) or `[N]` (N chosen tokens), and returns a value for each token, so that the
caller alone decides over which tokens of which ranks the mean goes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are held within this before they are exponentiated, so that one absurd token cannot give infinity."""


class PolicyLoss(NamedTuple):
    """The loss of each token and what is worth counting about it."""

    loss: Tensor
    ratio: Tensor
    is_clipped: Tensor
    importance_weight: Tensor


def _bounded_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def policy_loss(
    logprobs: Tensor,
    *,
    proximal_logprobs: Tensor,
    behavior_logprobs: Tensor,
    advantages: Tensor,
    clip: float,
    importance_cap: float,
) -> PolicyLoss:
    """Clipped surrogate (arXiv:1707.06347, eq. 7), decoupled for stale tokens (arXiv:2505.24298, eq. 5).

    w * max(-A u, -A clip(u, 1 - clip, 1 + clip)) with u = current / proximal, the trust region around the weights at
    the start of the step, and w = min(proximal / behaviour, importance_cap), without gradient, which corrects for
    tokens that older weights sampled. Where behaviour and proximal agree, w is exactly 1 and this is plain PPO.
    """
    ratio = _bounded_exp(logprobs - proximal_logprobs)
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    weight = _bounded_exp(proximal_logprobs - behavior_logprobs).clamp(max=importance_cap).detach()
    return PolicyLoss(torch.maximum(free, clipped) * weight, ratio, clipped > free, weight)


def value_loss(values: Tensor, *, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2 per token (PPO's released code; TRL, verl)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


def entropy(logprobs: Tensor) -> Tensor:
    """Entropy in nats of each distribution; `logprobs` [..., V] are normalised over the vocabulary V."""
    return -(logprobs.exp() * logprobs).sum(-1)


def token_mean(per_token: Tensor, mask: Tensor, count: float) -> Tensor:
    """Sum over unmasked tokens divided by `count`: the number of such tokens of *all* ranks and micro-batches.

    Dividing by the global count makes gradients add up over micro-batches and ranks to the gradient of the whole.
    """
    return torch.where(mask, per_token, 0.0).sum() / count
