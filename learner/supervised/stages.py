"""What differs between the supervised stages: how examples are read and counted, the loss, and the plan."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from learner.config import RewardModelConfig, SftConfig
from learner.distributed.ranks import Ranks
from learner.dpo_config import DpoConfig
from learner.model.actor_critic import ActorCritic
from learner.model.reward_net import RewardNet
from learner.supervised.choices import Choice, Rated, read_choices, read_rated
from learner.supervised.dpo import DirectLoss, dpo_plan
from learner.supervised.examples import Completion, Pair, read_completions, read_pairs
from learner.supervised.loop import Plan
from learner.supervised.preferences import PreferenceLoss, reward_model_plan
from learner.supervised.sft import CompletionLoss, sft_plan

Stage = SftConfig | RewardModelConfig | DpoConfig


def loss_of(
    stage: Stage, net: ActorCritic | RewardNet, ranks: Ranks, device: torch.device
) -> CompletionLoss | PreferenceLoss | DirectLoss:
    """Return the loss that the stage minimises."""
    if isinstance(net, RewardNet):
        assert isinstance(stage, RewardModelConfig)
        return PreferenceLoss(net, ranks, device, label_smoothing=stage.label_smoothing)
    return DirectLoss(net, ranks, device, stage) if isinstance(stage, DpoConfig) else CompletionLoss(net, ranks, device)


def reader_of(stage: Stage) -> Callable[..., list[Any]]:
    """Return the function that reads the stage's examples."""
    if isinstance(stage, DpoConfig):
        return read_rated if stage.loss == "kto" else read_choices
    if isinstance(stage, SftConfig):
        return partial(read_completions, train_on=stage.train_on)
    return read_pairs


def plan_of(stage: Stage, num_training: int, learning_rate: float) -> Plan:
    """Return the plan of the stage's settings for so many examples."""
    if isinstance(stage, DpoConfig):
        return dpo_plan(stage, num_training, learning_rate)
    make: Callable[..., Plan] = sft_plan if isinstance(stage, SftConfig) else reward_model_plan
    return make(stage, num_training, learning_rate)


def size_of(row: Completion | Pair | Choice | Rated, *, packed: bool) -> int:
    """Count a row's tokens in a micro-batch, which holds both responses of a pair."""
    if isinstance(row, Completion):
        return len(row.token_ids)
    if isinstance(row, Rated):
        return max(row.num_tokens(), row.mismatched.num_tokens())
    if isinstance(row, Choice):
        sizes = [side.num_tokens() for side in row.completions]
    else:
        sizes = [len(row.chosen), len(row.rejected)]
    return sum(sizes) if packed else 2 * max(sizes)
