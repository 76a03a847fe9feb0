"""Learning rates: the default by the model's size, and the schedule over the steps of a stage. Imports no torch."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

Shape = Literal["constant", "linear", "cosine"]
AT_A_BILLION = {"sft": 2e-5, "dpo": 1e-6, "reward_model": 1e-5, "ppo": 1e-6}
"""Default learning rate of each stage for a model of a billion parameters."""
LORA_FACTOR = 10
"""Adapters take larger steps than whole weights (arXiv:2106.09685, appendix D)."""
MAX_LEARNING_RATE = 5e-3


def default_learning_rate(stage: str, num_parameters: int, *, lora: bool = False) -> float:
    """Return the learning rate of a stage if none is set: inversely proportional to the root of the model's size.

    That is the usual 2e-5 (SFT), 1e-5 (reward model) and 1e-6 (PPO, DPO) at a billion parameters, ten times as much for
    adapters, never above 5e-3, with two significant digits.
    """
    rate = AT_A_BILLION[stage] * math.sqrt(1e9 / num_parameters) * (LORA_FACTOR if lora else 1)
    return float(f"{min(rate, MAX_LEARNING_RATE):.1e}")


class Schedule(NamedTuple):
    """How a learning rate changes over the steps of a stage, as a multiple of its peak.

    It rises linearly over the first `warmup_share` of the steps, and then falls to `final_share` one step after the
    last, unless it is constant.
    """

    shape: Shape
    warmup_share: float = 0.0
    final_share: float = 0.0

    def factor(self, step: int, num_steps: int) -> float:
        """Return the multiple of the peak at a step, from 1; depends on nothing else, so that a run can resume."""
        num_warmup = max(1, int(self.warmup_share * num_steps)) if self.warmup_share else 0
        if step <= num_warmup:
            return step / num_warmup
        progress = min(1.0, (step - 1 - num_warmup) / max(1, num_steps - num_warmup))
        if self.shape == "constant":
            return 1.0
        fall = 1 - progress if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.final_share + (1 - self.final_share) * fall
