"""Reward model training on preferences, by the model of Bradley and Terry. Shapes: B pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from learner.config import RewardModelConfig, num_supervised_steps, schedule_of
from learner.distributed.ranks import Ranks
from learner.model.reward_net import RewardNet
from learner.supervised import calibration
from learner.supervised.examples import Pair
from learner.supervised.loop import Plan, Row

STATISTICS, RECORD, HELD_OUT_REWARDS = "reward_statistics.json", "training.json", "held_out_rewards.parquet"
"""Further files in a reward model's folder."""
CENTERING = 0.01
"""Weight of the squared mean reward of a batch, which keeps the rewards' offset, free otherwise, near 0."""


class PreferenceLoss:
    """Mean negative log-likelihood of preferences (Bradley and Terry 1952).

    In training it is centred and labels are smoothed.

    A pair's margin is how much higher the chosen reward should be (Llama 2, arXiv:2307.09288, eq. 2). All methods are
    collective; `pieces` are this rank's part of `rows`, in micro-batches.
    """

    unit = "pairs"

    def __init__(self, net: RewardNet, ranks: Ranks, device: torch.device, *, label_smoothing: float = 0.0) -> None:
        self._net = net
        self._label_smoothing = label_smoothing
        self._ranks = ranks
        self._device = device

    def accumulate(self, pieces: Sequence[Sequence[Pair]], rows: Sequence[Pair]) -> Row:
        """Add the gradient of this rank's part of the loss of `rows`; returns their metrics.

        The gradient of the squared mean m of all ranks' rewards is 2 m times that of m, whose parts add up. So m is
        computed first: the graph of a single micro-batch is kept for this, several are computed twice.
        """
        num, sums = len(rows), self._zeros(2)
        graphs = [pair_rewards(self._net, piece) for piece in pieces] if len(pieces) == 1 else []
        level = self._level(graphs, pieces) / num
        for piece in pieces:
            chosen, rejected = graphs.pop() if graphs else pair_rewards(self._net, piece)
            nll = preference_nll(chosen, rejected, piece, self._label_smoothing)
            ((nll.sum() + 2 * CENTERING * level * (chosen + rejected).sum()) / num).backward()
            sums += torch.stack([nll.detach().sum(), agreement(chosen, rejected).sum()])
        nll_mean, accuracy = (self._ranks.all_sum(sums) / num).tolist()
        return {"loss": nll_mean + CENTERING * level**2, "accuracy": accuracy, "num_pairs": float(num)}

    @torch.no_grad()
    def _level(self, graphs: Sequence[tuple[Tensor, Tensor]], pieces: Sequence[Sequence[Pair]]) -> float:
        """Sum all ranks' rewards."""
        total = self._zeros(1)
        for chosen, rejected in graphs or (pair_rewards(self._net, piece) for piece in pieces):
            total += (chosen + rejected).sum(dtype=torch.float64)
        return float(self._ranks.all_sum(total))

    @torch.no_grad()
    def rewards(self, pieces: Sequence[Sequence[Pair]], places: Sequence[Sequence[int]], num: int) -> list[list[float]]:
        """Compute chosen and rejected rewards of all ranks' `num` rows.

        `places` are the row numbers of `pieces`.
        """
        rewards = torch.zeros(2, num, dtype=torch.float64, device=self._device)
        for piece, own in zip(pieces, places, strict=True):
            for side, values in enumerate(pair_rewards(self._net, piece)):
                rewards[side, list(own)] = values.double()
        numbers: list[list[float]] = self._ranks.all_sum(rewards).tolist()
        return numbers

    @torch.no_grad()
    def measure(self, pieces: Sequence[Sequence[Pair]], rows: Sequence[Pair]) -> Row:
        """Compute accuracy and loss of `rows`, not centred."""
        sums = self._zeros(2)
        for piece in pieces:
            chosen, rejected = pair_rewards(self._net, piece)
            sums += torch.stack([agreement(chosen, rejected).sum(), preference_nll(chosen, rejected, piece).sum()])
        accuracy, loss = (self._ranks.all_sum(sums) / len(rows)).tolist()
        return {"held_out_accuracy": accuracy, "held_out_loss": loss}

    def _zeros(self, num: int) -> Tensor:
        return torch.zeros(num, dtype=torch.float64, device=self._device)


@dataclass(frozen=True, slots=True)
class MeasuredRewards:
    """The rewards of pairs that a model was not trained on, and their metrics."""

    chosen: Sequence[float]
    rejected: Sequence[float]

    def measures(self) -> Row:
        """Compute `accuracy`, `ece`, `nll` and `margin_mean`."""
        return calibration.measures(self.chosen, self.rejected)

    def write(self, folder: Path, record: Mapping[str, Any]) -> None:
        """Write the rewards, their statistics and `record` of the training into the model's folder."""
        rewards = pa.table({"chosen": list(self.chosen), "rejected": list(self.rejected)})
        pq.write_table(rewards, folder / HELD_OUT_REWARDS)
        statistics = calibration.reward_statistics(self.chosen, self.rejected)
        for name, content in ((STATISTICS, statistics), (RECORD, record)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def pair_rewards(net: RewardNet, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Compute rewards [B] of the chosen and of the rejected responses, in one forward pass.

    Without pairs, still runs the forward pass: ranks must call a sharded model together.
    """
    inputs = pairs or [Pair([0], [0])]
    rewards = net([pair.chosen for pair in inputs] + [pair.rejected for pair in inputs])
    chosen, rejected = rewards[: len(inputs)], rewards[len(inputs) :]
    return chosen[: len(pairs)], rejected[: len(pairs)]


def preference_nll(chosen: Tensor, rejected: Tensor, pairs: Sequence[Pair], label_smoothing: float = 0.0) -> Tensor:
    """Compute each preference's negative log-likelihood [B], given the rewards [B].

    With label smoothing e, its mean with that of the opposite preference, weighted 1 - e and e: the minimum is at odds
    (1 - e) / e, which is right if labels are wrong with probability e (Mitchell 2023, "A note on DPO with noisy
    preferences & relationship to IPO", eq. 3).
    """
    margins = torch.tensor([pair.margin for pair in pairs], dtype=chosen.dtype, device=chosen.device)
    distances = chosen - rejected - margins
    nll = -F.logsigmoid(distances)
    if not label_smoothing:
        return nll
    return (1 - label_smoothing) * nll - label_smoothing * F.logsigmoid(-distances)


def agreement(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return [B]: 1 if the chosen response has the higher reward, 0 if the lower, 0.5 on a tie."""
    return ((chosen > rejected).double() + (chosen >= rejected).double()) / 2


def reward_model_plan(config: RewardModelConfig, num_training: int, learning_rate: float) -> Plan:
    """Return the plan of these settings: evaluates after every epoch."""
    steps_per_epoch = -(-num_training // config.batch_size)
    return Plan(
        num_steps=num_supervised_steps(config, num_training),
        learning_rate=learning_rate,
        schedule=schedule_of(config),
        evaluate_every_steps=steps_per_epoch,
        keeps_best=config.patience is not None,
        patience=config.patience,
        checkpoint_every_steps=config.checkpoint_every_steps,
        unit=PreferenceLoss.unit,
    )
