"""Run PPO on letters as a plain torch script: the baseline for the learner and for whole runs.

Shares only the trajectory record and the settings with `learner/`: two transformers models, padded tensors, generalised
advantage estimation, clipped losses, AdamW. As in the learner, the forward pass for the old log-probabilities is also
that of the first epoch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

from cluster.trajectory import Trajectory
from learner.config import LearnerConfig


class BareLoop:
    """Policy, critic, reference and optimiser; `step` is one PPO step on a batch. Also runs as a Ray actor."""

    def __init__(self, model_path: str, config: LearnerConfig) -> None:
        self._config = config
        load = AutoModelForCausalLM.from_pretrained
        self._policy: Any = load(model_path).eval()
        self._reference: Any = load(model_path).eval().requires_grad_(False)
        self._critic: Any = load(model_path).base_model.eval()
        self._head = torch.nn.Linear(self._policy.config.hidden_size, 1)
        torch.nn.init.zeros_(self._head.weight)
        self._parameters = [*self._policy.parameters(), *self._critic.parameters(), *self._head.parameters()]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=config.learning_rate, weight_decay=0.0, fused=True)

    async def step_s(self, trajectories: Sequence[Trajectory]) -> float:
        """Run one step and return its seconds."""
        started = time.monotonic()
        self.step(trajectories)
        return time.monotonic() - started

    def step(self, trajectories: Sequence[Trajectory]) -> None:
        """Train all epochs on one batch of B trajectories; the whole batch is one mini-batch."""
        config = self._config
        ids, mask, scores = _padded(trajectories)
        logprobs, values = self._forward(ids, mask)
        with torch.no_grad():
            hidden = self._reference.base_model(input_ids=ids[:, :-1]).last_hidden_state
            reference = _chosen(self._reference.lm_head(hidden), ids)
        old_logprobs, old_values = logprobs.detach(), values.detach()
        rewards = -config.kl_coefficient * (old_logprobs - reference) * mask
        rewards[torch.arange(len(ids)), mask.cumsum(1).argmax(1)] += scores
        advantages, returns = _gae(rewards, old_values, mask, config.gamma, config.gae_lambda)
        chosen = advantages[mask]
        advantages = (advantages - chosen.mean()) / (chosen.var() + 1e-8).sqrt()
        for epoch in range(config.num_epochs):
            if epoch:
                logprobs, values = self._forward(ids, mask)
            ratio = (logprobs - old_logprobs).exp()
            policy_loss = torch.maximum(
                -advantages * ratio, -advantages * ratio.clamp(1 - config.clip, 1 + config.clip)
            )
            clipped = old_values + (values - old_values).clamp(-config.value_clip, config.value_clip)
            value_loss = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2) / 2
            loss = (policy_loss + config.value_coefficient * value_loss)[mask].mean()
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._parameters, config.max_grad_norm)
            self._optimizer.step()

    def _forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and values [B, T - 1] of the tokens after the first."""
        hidden = self._policy.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        seen = self._critic(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        return _chosen(self._policy.lm_head(hidden), ids), self._head(seen)[..., 0]


def _padded(trajectories: Sequence[Trajectory]) -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids [B, T], the mask [B, T - 1] of sampled tokens after the first, and scores [B]."""
    width = max(len(trajectory.token_ids) for trajectory in trajectories)
    ids = torch.zeros(len(trajectories), width, dtype=torch.long)
    mask = torch.zeros(len(trajectories), width, dtype=torch.bool)
    for row, trajectory in enumerate(trajectories):
        ids[row, : len(trajectory.token_ids)] = torch.tensor(trajectory.token_ids)
        mask[row, : len(trajectory.mask)] = torch.tensor(trajectory.mask)
    return ids, mask[:, 1:], torch.tensor([trajectory.reward for trajectory in trajectories])


def _chosen(logits: Tensor, ids: Tensor) -> Tensor:
    return log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]


def _gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    values = values * mask
    advantages = torch.zeros_like(values)
    following, following_value = torch.zeros(len(values)), torch.zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        advantages[:, t], following_value = following, values[:, t]
    return advantages, advantages + values
