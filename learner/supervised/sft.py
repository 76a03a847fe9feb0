"""Supervised fine-tuning on prompts and completions, with the loss over the completions only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from learner.config import SftConfig, num_supervised_steps, schedule_of
from learner.distributed.ranks import Ranks
from learner.model.actor_critic import ActorCritic
from learner.model.tokenizer import pad
from learner.supervised.examples import Completion
from learner.supervised.loop import Plan, Row


class CompletionLoss:
    """Mean negative log-likelihood over the completion tokens of rows; every token has the same weight.

    All methods are collective; `pieces` are this rank's part of `rows`, in micro-batches.
    """

    unit = "tokens"

    def __init__(self, net: ActorCritic, ranks: Ranks, device: torch.device) -> None:
        self._net = net
        self._ranks = ranks
        self._device = device

    def accumulate(self, pieces: Sequence[Sequence[Completion]], rows: Sequence[Completion]) -> Row:
        """Add the gradient of this rank's part of the loss of `rows`; returns their metrics."""
        return {"loss": self._mean(pieces, rows), "num_tokens": float(sum(len(row.token_ids) for row in rows))}

    def measure(self, pieces: Sequence[Sequence[Completion]], rows: Sequence[Completion]) -> Row:
        """Compute the loss of `rows`."""
        with torch.no_grad():
            return {"held_out_loss": self._mean(pieces, rows)}

    def _mean(self, pieces: Sequence[Sequence[Completion]], rows: Sequence[Completion]) -> float:
        """Compute the loss and, if gradients are enabled, add them up over the micro-batches."""
        num = max(1, sum(map(num_learnt, rows)))
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for piece in pieces:
            nll = completion_nll(self._net, piece, self._device)
            if torch.is_grad_enabled():
                (nll / num).backward()
            total += nll.detach()
        return float(self._ranks.all_sum(total)) / num


def num_learnt(row: Completion) -> int:
    """Count the trained tokens that have a token before them."""
    earlier = sum(end - max(1, start) for start, end in row.earlier)
    return len(row.token_ids) - max(1, row.num_prompt) + earlier


def completion_nll(net: ActorCritic, rows: Sequence[Completion], device: torch.device) -> Tensor:
    """Compute the negative log-likelihood [], summed over the completion tokens; 0 without rows."""
    return -_completion_logprobs(net, rows, device).sum()


def summed_logprobs(net: ActorCritic, rows: Sequence[Completion], device: torch.device) -> Tensor:
    """Compute each completion's log-probability [B], summed over its tokens.

    Without rows, still runs the forward pass: ranks must call a sharded model together.
    """
    return _completion_logprobs(net, rows, device).sum(1)[: len(rows)]


def _completion_logprobs(net: ActorCritic, rows: Sequence[Completion], device: torch.device) -> Tensor:
    """Compute log-probabilities [B, T], 0 outside of the completions; without rows, those of a row without any."""
    inputs = list(rows) or [Completion([0, 0], 2)]
    lengths = [max(2, len(row.token_ids)) for row in inputs]
    token_ids = pad([[*row.token_ids, 0][: max(2, len(row.token_ids))] for row in inputs], 0)
    places, ends = torch.arange(token_ids.shape[1]), torch.tensor([len(row.token_ids) for row in inputs])
    starts = torch.tensor([max(1, row.num_prompt) for row in inputs])
    mask = (places >= starts[:, None]) & (places < ends[:, None])
    for number, row in enumerate(inputs):
        for start, end in row.earlier:
            mask[number, max(1, start) : end] = True
    logprobs: Tensor = net(token_ids.to(device), mask.to(device), lengths, logprobs_only=True).logprobs
    return logprobs


def sft_plan(config: SftConfig, num_training: int, learning_rate: float) -> Plan:
    """Return the plan of these settings."""
    return Plan(
        num_steps=num_supervised_steps(config, num_training),
        learning_rate=learning_rate,
        schedule=schedule_of(config),
        evaluate_every_steps=config.evaluate_every_steps,
        keeps_best=True,
        patience=config.patience,
        checkpoint_every_steps=config.checkpoint_every_steps,
        unit=CompletionLoss.unit,
    )
