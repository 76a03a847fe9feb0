"""Reward model training: what is learnt from preferences, by the model of Bradley and Terry.

Knows nothing of who prefers, of files and of stages. B pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from learner.config import RewardModelConfig
from learner.datasets import Pair
from learner.ranks import Ranks
from learner.reward_net import RewardNet
from learner.supervised_loop import Plan, Row

CENTERING = 0.01
"""Weight of the squared mean reward of a batch: preferences leave the level of rewards open, this keeps it near 0."""


class PreferenceLoss:
    """Mean negative log-likelihood of preferences (Bradley and Terry 1952), centred in training.

    A pair's margin is by how much the chosen reward should be higher (Llama 2, arXiv:2307.09288, eq. 2). All methods
    wait for the other ranks; `pieces` are this rank's part of `rows`, in micro-batches.
    """

    unit = "pairs"

    def __init__(self, net: RewardNet, ranks: Ranks, device: torch.device) -> None:
        self._net = net
        self._ranks = ranks
        self._device = device

    def accumulate(self, pieces: Sequence[Sequence[Pair]], rows: Sequence[Pair]) -> Row:
        """Leave the gradient of this rank's part of the loss of `rows`; returns what is told of them.

        The gradient of the squared mean m of all ranks' rewards is 2 m times that of m, whose parts add up. So m has
        to be known first: a single piece's graph is kept for that, several are computed twice.
        """
        num, sums = len(rows), self._zeros(2)
        graphs = [pair_rewards(self._net, piece) for piece in pieces] if len(pieces) == 1 else []
        level = self._level(graphs, pieces) / num
        for piece in pieces:
            chosen, rejected = graphs.pop() if graphs else pair_rewards(self._net, piece)
            nll = preference_nll(chosen, rejected, piece)
            ((nll.sum() + 2 * CENTERING * level * (chosen + rejected).sum()) / num).backward()
            sums += torch.stack([nll.detach().sum(), agreement(chosen, rejected).sum()])
        nll_mean, accuracy = (self._ranks.all_sum(sums) / num).tolist()
        return {"loss": nll_mean + CENTERING * level**2, "accuracy": accuracy, "num_pairs": float(num)}

    @torch.no_grad()
    def _level(self, graphs: Sequence[tuple[Tensor, Tensor]], pieces: Sequence[Sequence[Pair]]) -> float:
        """The sum of all ranks' rewards."""
        total = self._zeros(1)
        for chosen, rejected in graphs or (pair_rewards(self._net, piece) for piece in pieces):
            total += (chosen + rejected).sum(dtype=torch.float64)
        return float(self._ranks.all_sum(total))

    @torch.no_grad()
    def measure(self, pieces: Sequence[Sequence[Pair]], rows: Sequence[Pair]) -> Row:
        """Accuracy and loss, not centred, of `rows`."""
        sums = self._zeros(2)
        for piece in pieces:
            chosen, rejected = pair_rewards(self._net, piece)
            sums += torch.stack([agreement(chosen, rejected).sum(), preference_nll(chosen, rejected, piece).sum()])
        accuracy, loss = (self._ranks.all_sum(sums) / len(rows)).tolist()
        return {"held_out_accuracy": accuracy, "held_out_loss": loss}

    def _zeros(self, num: int) -> Tensor:
        return torch.zeros(num, dtype=torch.float64, device=self._device)


def pair_rewards(net: RewardNet, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Rewards [B] of the chosen and of the rejected responses, from one forward pass over all of them.

    No pairs at all give none, but for the pass.
    """
    given = pairs or [Pair([0], [0])]
    rewards = net([pair.chosen for pair in given] + [pair.rejected for pair in given])
    chosen, rejected = rewards[: len(given)], rewards[len(given) :]
    return chosen[: len(pairs)], rejected[: len(pairs)]


def preference_nll(chosen: Tensor, rejected: Tensor, pairs: Sequence[Pair]) -> Tensor:
    """[B]: each preference's negative log-likelihood, given the rewards [B]."""
    margins = torch.tensor([pair.margin for pair in pairs], dtype=chosen.dtype, device=chosen.device)
    return -F.logsigmoid(chosen - rejected - margins)


def agreement(chosen: Tensor, rejected: Tensor) -> Tensor:
    """[B]: 1 where the chosen response got the higher reward, 0 where the lower, 0.5 on a tie."""
    return ((chosen > rejected).double() + (chosen >= rejected).double()) / 2


def reward_model_plan(config: RewardModelConfig, num_training: int) -> Plan:
    """The loop of these settings: measured after every epoch."""
    steps_per_epoch = -(-num_training // config.batch_size)
    return Plan(
        num_steps=config.num_epochs * steps_per_epoch,
        learning_rate=config.learning_rate,
        evaluate_every_steps=steps_per_epoch,
        keeps_best=config.patience is not None,
        patience=config.patience,
        checkpoint_every_steps=config.checkpoint_every_steps,
        unit=PreferenceLoss.unit,
    )
