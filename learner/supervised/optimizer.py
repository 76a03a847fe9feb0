"""Optimizer and learning-rate schedule of the supervised stages."""

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
    """AdamW with gradients clipped to norm 1; linear warm-up over a tenth of the steps, then cosine to a tenth.

    `num_done` is the optimiser steps done: where in that schedule the next one is.
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
        """Forget all gradients."""
        self.adamw.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Sum the gradients over ranks and descend by one optimiser step; waits for the other ranks.

        Raises LearnerError, on all of them, before the weights are touched by a gradient that is not finite.
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
    """Factor of the peak learning rate at optimiser step 0, 1, ...: up over a tenth, then a cosine down to 0.1."""
    warmup = max(1, num_steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))

    return factor
