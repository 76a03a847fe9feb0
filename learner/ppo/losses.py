"""PPO's losses per token, and their aggregation.

Pure functions over tensors. Every function takes tensors of one shape, `[B, T]` (B trajectories, T tokens of the
longest) or `[N]` (N selected tokens), and returns a value per token, so that the caller decides which tokens of which
ranks to average.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from learner.ppo.advantages import MAX_LOG_RATIO

Objective = Literal["ppo", "gspo", "cispo"]


class PolicyLoss(NamedTuple):
    """The loss of each token, its probability ratio, and whether the clip decides the loss."""

    loss: Tensor
    ratio: Tensor
    is_clipped: Tensor


class ValueLoss(NamedTuple):
    """The loss of each token, and whether the clip decides it."""

    loss: Tensor
    is_clipped: Tensor


def _bounded_exp(log_ratio: Tensor) -> Tensor:
    """Exponentiate a clamped log-ratio, so that a single extreme token cannot give infinity."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def importance_weights(
    proximal_logprobs: Tensor,
    behavior_logprobs: Tensor,
    mask: Tensor,
    *,
    level: Literal["token", "sequence"] = "token",
    cap: float,
    floor: float = 0.0,
    outside: Literal["truncate", "mask"] = "truncate",
) -> Tensor:
    """Compute weights [B, T] that correct for tokens sampled by another policy than the proximal one.

    They have no gradient. A weight is proximal / behaviour of each token, or (`sequence`) the product over the row, on
    each of its tokens. A weight above `cap` becomes `cap` ("truncated importance sampling", arXiv:1802.01561, eq. 1),
    or with `outside="mask"` one above `cap` or below `floor` becomes 0 (IcePop's band, arXiv:2510.18855, eq. 3). If
    behaviour and proximal agree it is exactly 1.
    """
    log_ratio = torch.where(mask, proximal_logprobs - behavior_logprobs, 0.0).detach()
    if level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    weight = _bounded_exp(log_ratio)
    if outside == "mask":
        return torch.where((weight <= cap) & (weight >= floor), weight, 0.0)
    return weight.clamp(max=cap)


def policy_loss(
    logprobs: Tensor,
    *,
    proximal_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    objective: Objective = "ppo",
) -> PolicyLoss:
    """Compute the policy loss per token before importance weights.

    u is the current / proximal probability, A the advantage.

    `ppo`: max(-A u, -A clip(u, 1 - clip, 1 + clip)) (arXiv:1707.06347, eq. 7); with weights proximal / behaviour it is
    the decoupled objective (arXiv:2110.00641, eq. 8; arXiv:2505.24298, eq. 5).
    `gspo`: the same with the geometric mean of u over the row in place of u (arXiv:2507.18071, eq. 13).
    `cispo`: -clip(u) A log p, the clipped ratio without gradient (arXiv:2506.13585, eq. 4).
    `clip_high` replaces the upper clip (arXiv:2503.14476, eq. 10); if A < 0 the maximum is at most
    -A dual_clip (arXiv:1912.09729, eq. 5).
    """
    log_ratio = logprobs - proximal_logprobs
    if objective == "gspo":
        log_ratio = _sequence_mean(log_ratio, mask)
    ratio = _bounded_exp(log_ratio)
    clipped_ratio = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    if objective == "cispo":
        return PolicyLoss(-advantages * clipped_ratio.detach() * logprobs, ratio, clipped_ratio != ratio)
    free, clipped = -advantages * ratio, -advantages * clipped_ratio
    worse, is_clipped = torch.maximum(free, clipped), clipped > free
    if dual_clip is not None:
        bound = -advantages * dual_clip
        is_bounded = (advantages < 0) & (worse > bound)
        worse, is_clipped = torch.where(is_bounded, bound, worse), is_clipped | is_bounded
    return PolicyLoss(worse, ratio, is_clipped)


def _sequence_mean(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Compute the row's mean log-ratio.

    Each token's gradient is that of its own log-ratio (GSPO-token, eq. 14).
    """
    counts = mask.sum(1, keepdim=True).clamp(min=1)
    mean = torch.where(mask, log_ratio, 0.0).detach().sum(1, keepdim=True) / counts
    return mean + (log_ratio - log_ratio.detach())


def value_loss(values: Tensor, *, old_values: Tensor, returns: Tensor, clip: float) -> ValueLoss:
    """Compute the clipped value loss per token, as PPO's released code does.

    max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2
    """
    clipped = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    free = (values - returns).square()
    return ValueLoss(torch.maximum(free, clipped) / 2, clipped > free)


def token_mean(per_token: Tensor, mask: Tensor, count: float) -> Tensor:
    """Sum the unmasked tokens and divide by `count`.

    `count` is the number of such tokens of *all* ranks and micro-batches. With the global count, gradients of
    micro-batches and ranks add up to the gradient of the whole batch.
    """
    return torch.where(mask, per_token, 0.0).sum() / count


Aggregation = Literal["token_mean", "sequence_mean_token_sum", "sequence_mean_token_mean"]


def aggregate(
    per_token: Tensor, mask: Tensor, aggregation: Aggregation, *, num_tokens: float, num_sequences: float
) -> Tensor:
    """Aggregate the unmasked tokens [B, T] by *global* counts, so that micro-batches add up.

    `token_mean`: each token weighs 1 / num_tokens. The others: each sequence weighs 1 / num_sequences, as the sum or
    the mean of its own tokens.
    """
    if aggregation == "token_mean":
        return token_mean(per_token, mask, num_tokens)
    sums = torch.where(mask, per_token, 0.0).sum(1)
    if aggregation == "sequence_mean_token_mean":
        sums = sums / mask.sum(1).clamp(min=1)
    return sums.sum() / num_sequences
