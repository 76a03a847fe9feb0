"""PPO's losses, token by token, and how tokens become one number.

Pure functions over tensors; knows no model, no rank and no RLlib. Every function takes tensors of one shape, `[B, T]`
(B trajectories, T tokens of the longest) or `[N]` (N chosen tokens), and returns a value for each token, so that the
caller alone decides over which tokens of which ranks the mean goes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from learner.advantages import MAX_LOG_RATIO


class PolicyLoss(NamedTuple):
    """The loss of each token and what is worth counting about it."""

    loss: Tensor
    ratio: Tensor
    is_clipped: Tensor
    importance_weight: Tensor


def _bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp, held finite: one absurd token cannot give infinity."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def policy_loss(
    logprobs: Tensor,
    *,
    proximal_logprobs: Tensor,
    behavior_logprobs: Tensor,
    advantages: Tensor,
    clip: float,
    importance_cap: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """Clipped surrogate (arXiv:1707.06347, eq. 7), decoupled for stale tokens (arXiv:2505.24298, eq. 5).

    w * max(-A u, -A clip(u, 1 - clip, 1 + clip)) with u = current / proximal, the trust region around the weights at
    the start of the step, and w = min(proximal / behaviour, importance_cap), without gradient, which corrects for
    tokens that older weights sampled. Where behaviour and proximal agree, w is exactly 1 and this is plain PPO.
    `clip_high` replaces the upper clip (arXiv:2503.14476, eq. 10); where A < 0 the maximum is held below
    -A dual_clip (arXiv:1912.09729, eq. 5).
    """
    ratio = _bounded_exp(logprobs - proximal_logprobs)
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    weight = _bounded_exp(proximal_logprobs - behavior_logprobs).clamp(max=importance_cap).detach()
    worse, is_clipped = torch.maximum(free, clipped), clipped > free
    if dual_clip is not None:
        bound = -advantages * dual_clip
        is_bounded = (advantages < 0) & (worse > bound)
        worse, is_clipped = torch.where(is_bounded, bound, worse), is_clipped | is_bounded
    return PolicyLoss(worse * weight, ratio, is_clipped, weight)


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


Aggregation = Literal["token_mean", "sequence_mean_token_sum", "sequence_mean_token_mean"]


def aggregate(
    per_token: Tensor, mask: Tensor, aggregation: Aggregation, *, num_tokens: float, num_sequences: float
) -> Tensor:
    """One number of the unmasked tokens [B, T], by *global* counts, so that pieces add up to the whole.

    `token_mean`: each token weighs 1 / num_tokens. The others: each sequence weighs 1 / num_sequences, as the sum or
    the mean of its own tokens.
    """
    if aggregation == "token_mean":
        return token_mean(per_token, mask, num_tokens)
    sums = torch.where(mask, per_token, 0.0).sum(1)
    if aggregation == "sequence_mean_token_mean":
        sums = sums / mask.sum(1).clamp(min=1)
    return sums.sum() / num_sequences
