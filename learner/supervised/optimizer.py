"""Optimiser and learning-rate schedule of the supervised stages."""

from __future__ import annotations

import torch
from torch import nn

from cluster.errors import LearnerError
from learner.distributed.gradients import clip_gradients, gradient_norm
from learner.distributed.ranks import Ranks
from learner.learning_rates import Schedule

MAX_GRAD_NORM = 1.0


class Optimizer:
    """AdamW with gradients clipped to norm 1 and a schedule of the learning rate.

    `num_done` is the number of optimiser steps done, which is the position in the schedule.
    """

    def __init__(
        self,
        model: nn.Module,
        adamw: torch.optim.Optimizer,
        ranks: Ranks,
        *,
        learning_rate: float,
        schedule: Schedule,
        num_steps: int,
    ) -> None:
        self.adamw = adamw
        self.num_done = 0
        self._parameters = [weights for weights in model.parameters() if weights.requires_grad]
        self._ranks = ranks
        self._learning_rate = learning_rate
        self._schedule = schedule
        self._num_steps = num_steps

    def clear(self) -> None:
        """Clear all gradients."""
        self.adamw.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Sum the gradients over ranks and run one optimiser step. Collective.

        Raises LearnerError on all ranks, before the weights change, if the gradient is not finite.
        """
        for group in self.adamw.param_groups:
            group["lr"] = self._learning_rate * self._schedule.factor(self.num_done + 1, self._num_steps)
        self._ranks.sum_gradients(self._parameters)
        norm = gradient_norm(self._parameters)
        if not torch.isfinite(norm):
            raise LearnerError(f"step {self.num_done + 1}", f"the gradient is not finite (norm {float(norm)})")
        clip_gradients(self._parameters, norm, MAX_GRAD_NORM)
        self.adamw.step()
        self.num_done += 1
