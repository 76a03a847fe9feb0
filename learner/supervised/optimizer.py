"""Optimiser and learning-rate schedule of the supervised stages."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from cluster.errors import LearnerError
from learner.distributed.gradients import clip_gradients, gradient_norm
from learner.distributed.ranks import Ranks

MAX_GRAD_NORM = 1.0


class Optimizer:
    """AdamW with gradients clipped to norm 1.

    Linear warm-up over a tenth of the steps, then cosine to a tenth.

    `num_done` is the number of optimiser steps done, which is the position in the schedule.
    """

    def __init__(
        self, model: nn.Module, adamw: torch.optim.Optimizer, ranks: Ranks, *, learning_rate: float, num_steps: int
    ) -> None:
        self.adamw = adamw
        self.num_done = 0
        self._parameters = list(model.parameters())
        self._ranks = ranks
        self._learning_rate = learning_rate
        self._factor = warmup_then_cosine(num_steps)

    def clear(self) -> None:
        """Clear all gradients."""
        self.adamw.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Sum the gradients over ranks and run one optimiser step. Collective.

        Raises LearnerError on all ranks, before the weights change, if the gradient is not finite.
        """
        for group in self.adamw.param_groups:
            group["lr"] = self._learning_rate * self._factor(self.num_done)
        self._ranks.sum_gradients(self._parameters)
        norm = gradient_norm(self._parameters)
        if not torch.isfinite(norm):
            raise LearnerError(f"step {self.num_done + 1}", f"the gradient is not finite (norm {float(norm)})")
        clip_gradients(self._parameters, norm, MAX_GRAD_NORM)
        self.adamw.step()
        self.num_done += 1


def warmup_then_cosine(num_steps: int) -> Callable[[int], float]:
    """Return the factor of the peak learning rate by step: a warm-up over a tenth, then a cosine to 0.1."""
    warmup = max(1, num_steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))

    return factor
