"""Direct preference optimisation of a batch: loss, gradient and metrics. Shapes: B pairs or responses, N responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from learner.config import num_supervised_steps, schedule_of
from learner.distributed.ranks import Ranks
from learner.dpo_config import DpoConfig
from learner.model.actor_critic import ActorCritic
from learner.supervised.choices import Choice, Rated
from learner.supervised.direct import ipo_loss, kto_loss, sigmoid_loss
from learner.supervised.examples import Completion
from learner.supervised.loop import Plan, Row
from learner.supervised.preferences import agreement
from learner.supervised.sft import num_learnt, summed_logprobs


class _Terms(NamedTuple):
    """What a batch's loss and metrics are made of."""

    losses: Tensor
    """[B]"""
    is_right: Tensor
    """[B]: 1 if the policy agrees with the preference, 0.5 on a tie."""
    logprobs: Tensor
    """[N]"""
    rewards: Tensor
    """[N]"""
    is_chosen: Tensor
    """[N]: whether the response is chosen or desirable."""

    def sums(self) -> Tensor:
        """Return loss, agreement, and of chosen and of rejected responses number, rewards and log-probabilities."""
        sums = [self.losses.sum(), self.is_right.sum()]
        for side in (self.is_chosen, ~self.is_chosen):
            sums += [side.sum().double(), self.rewards[side].sum(), self.logprobs[side].sum()]
        return torch.stack(sums).detach()


NUM_SUMS = 8


class DirectLoss:
    """Mean loss of pairs or labelled responses, whose reference log-probabilities are known.

    A response's reward is beta times its log-ratio. All methods are collective; `pieces` are this rank's part of
    `rows`, in micro-batches.
    """

    def __init__(self, net: ActorCritic, ranks: Ranks, device: torch.device, config: DpoConfig) -> None:
        self._net = net
        self._ranks = ranks
        self._device = device
        self._config = config

    def accumulate(self, pieces: Sequence[Sequence[Choice | Rated]], rows: Sequence[Choice | Rated]) -> Row:
        """Add the gradient of this rank's part of the loss of `rows`; returns their metrics."""
        return self._metrics(pieces, rows) | {f"num_{unit_of(self._config)}": float(len(rows))}

    def measure(self, pieces: Sequence[Sequence[Choice | Rated]], rows: Sequence[Choice | Rated]) -> Row:
        """Compute loss, accuracy and reward margin of `rows`."""
        with torch.no_grad():
            metrics = self._metrics(pieces, rows)
        names = {"loss": "loss", "accuracy": "accuracy", "rewards/margins": "margin"}
        return {f"held_out_{name}": metrics[key] for key, name in names.items() if key in metrics}

    def _metrics(self, pieces: Sequence[Sequence[Choice | Rated]], rows: Sequence[Choice | Rated]) -> Row:
        """Compute metrics and, if gradients are enabled, add them up over the micro-batches."""
        kl = self._kl(pieces, len(rows)) if self._config.loss == "kto" else None
        sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=self._device)
        for piece in pieces:
            terms = self._pair_terms(_choices(piece)) if kl is None else self._rated_terms(_rated(piece), kl)
            if torch.is_grad_enabled():
                (terms.losses.sum() / len(rows)).backward()
            sums += terms.sums()
        row = _row(self._ranks.all_sum(sums).tolist(), len(rows))
        return row if kl is None else row | {"kl_nats": kl}

    def _pair_terms(self, pairs: Sequence[Choice]) -> _Terms:
        config, reference = self._config, self._reference(pairs)
        logprobs = summed_logprobs(self._net, _sides(pairs), self._device).double()
        ratios = (logprobs - reference.T.reshape(-1)).view(2, len(pairs))
        chosen, rejected = ratios
        if config.loss == "ipo":
            lengths = torch.tensor([num_learnt(side) for side in _sides(pairs)], device=self._device)
            losses = ipo_loss(*(ratios / lengths.view(2, len(pairs)).clamp(min=1)), beta=config.beta)
        else:
            losses = sigmoid_loss(chosen, rejected, beta=config.beta, label_smoothing=config.label_smoothing)
        is_chosen = torch.arange(2 * len(pairs), device=self._device) < len(pairs)
        return _Terms(losses, agreement(chosen, rejected), logprobs, config.beta * ratios.reshape(-1), is_chosen)

    def _rated_terms(self, rows: Sequence[Rated], kl: float) -> _Terms:
        config, completions = self._config, [row.completion for row in rows]
        logprobs = summed_logprobs(self._net, completions, self._device).double()
        ratios = logprobs - self._reference(rows)[:, 0]
        is_desirable = torch.tensor([row.is_desirable for row in rows], dtype=torch.bool, device=self._device)
        losses = kto_loss(
            ratios,
            is_desirable,
            kl,
            beta=config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )
        gains = torch.where(is_desirable, ratios - kl, kl - ratios)
        return _Terms(losses, agreement(gains, torch.zeros_like(gains)), logprobs, config.beta * ratios, is_desirable)

    @torch.no_grad()
    def _kl(self, pieces: Sequence[Sequence[Choice | Rated]], num: int) -> float:
        """Estimate the KL from the policy to the reference by mismatched completions, at least 0."""
        total = torch.zeros(1, dtype=torch.float64, device=self._device)
        for piece in map(_rated, pieces):
            logprobs = summed_logprobs(self._net, [row.mismatched for row in piece], self._device).double()
            total += (logprobs - self._reference(piece)[:, 1]).sum()
        return max(0.0, float(self._ranks.all_sum(total)) / num)

    def _reference(self, rows: Sequence[Choice | Rated]) -> Tensor:
        """Return the reference log-probabilities [B, 2]."""
        reference = [row.reference for row in rows]
        return torch.tensor(reference, dtype=torch.float64, device=self._device).view(len(rows), 2)


def _choices(rows: Sequence[Choice | Rated]) -> list[Choice]:
    return [row for row in rows if isinstance(row, Choice)]


def _rated(rows: Sequence[Choice | Rated]) -> list[Rated]:
    return [row for row in rows if isinstance(row, Rated)]


def _sides(pairs: Sequence[Choice]) -> list[Completion]:
    """Return all chosen completions, then all rejected ones."""
    return [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]


def _row(sums: Sequence[float], num: int) -> Row:
    """Return the metrics of `num` rows; those of a side that has no response are left out."""
    row = {"loss": sums[0] / num, "accuracy": sums[1] / num}
    for side, (count, rewards, logprobs) in (("chosen", sums[2:5]), ("rejected", sums[5:8])):
        if count:
            row |= {f"rewards/{side}": rewards / count, f"logps/{side}": logprobs / count}
    if "rewards/chosen" in row and "rewards/rejected" in row:
        row["rewards/margins"] = row["rewards/chosen"] - row["rewards/rejected"]
    return row


def unit_of(config: DpoConfig) -> str:
    """Return what a row of the data is."""
    return "responses" if config.loss == "kto" else "pairs"


def dpo_plan(config: DpoConfig, num_training: int, learning_rate: float) -> Plan:
    """Return the plan of these settings."""
    return Plan(
        num_steps=num_supervised_steps(config, num_training),
        learning_rate=learning_rate,
        schedule=schedule_of(config),
        evaluate_every_steps=config.evaluate_every_steps or -(-num_training // config.batch_size),
        keeps_best=config.patience is not None,
        patience=config.patience,
        checkpoint_every_steps=config.checkpoint_every_steps,
        unit=unit_of(config),
    )
