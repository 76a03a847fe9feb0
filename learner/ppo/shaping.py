"""What becomes of a score before advantages are made of it: normalised, clipped, less penalties.

Pure but for the running statistics, which every rank keeps alike; knows no model and no RLlib. Shapes: B trajectories
of this rank, in admission order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from learner.config import LearnerConfig
from learner.ppo.advantages import AllSum


class RunningMoments:
    """Mean and unbiased variance of all values given so far, by all ranks (Chan, Golub and LeVeque 1979).

    A function of which values came in which batch: ranks and micro-batches change nothing but last bits.
    """

    def __init__(self) -> None:
        self.count = self.mean = self._squares = 0.0

    @property
    def deviation(self) -> float:
        """The standard deviation; 0 for fewer than two values."""
        return (self._squares / (self.count - 1)) ** 0.5 if self.count > 1 else 0.0

    def update(self, values: Tensor, all_sum: AllSum) -> None:
        """Take in the values [B] of this batch, on this rank or on all of them perhaps none; waits for the others."""
        values = values.detach().double()
        count, total = all_sum(torch.stack([values.new_tensor(len(values)), values.sum()])).tolist()
        if not count:
            return
        mean = total / count
        squares = float(all_sum((values - mean).square().sum()))
        both, apart = self.count + count, mean - self.mean
        self._squares += squares + apart**2 * self.count * count / both
        self.mean += apart * count / both
        self.count = both

    def state(self) -> Tensor:
        """All there is to it [3], float64."""
        return torch.tensor([self.count, self.mean, self._squares], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """Take back what `state` gave."""
        self.count, self.mean, self._squares = state.tolist()


def normalized_scores(scores: Tensor, parts: Sequence[tuple[Tensor, RunningMoments]], all_sum: AllSum) -> Tensor:
    """The scores [B] less the running mean of their part, over its running deviation.

    Each part is a mask [B] and its statistics, which take its scores in first, so that the first batch is normalised
    too. Waits for the other ranks.
    """
    normalized = scores.clone()
    for chosen, moments in parts:
        moments.update(scores[chosen], all_sum)
        normalized[chosen] = (scores[chosen] - moments.mean) / (moments.deviation + 1e-8)
    return normalized


def shaped_scores(scores: Tensor, *, lengths: Tensor, ends: Tensor, config: LearnerConfig) -> Tensor:
    """The scores [B] that advantages are made of, by the settings: clipped, then less the penalties.

    `lengths` are sampled tokens, `ends` true where the response ended by itself.
    """
    if config.reward_clip is not None:
        scores = scores.clamp(-config.reward_clip, config.reward_clip)
    scores = scores - config.missing_eos_penalty * (~ends).to(scores.dtype)
    if config.overlong_tokens is not None:
        scores = scores - overlong_penalty(
            lengths, start=config.overlong_tokens, buffer=config.overlong_buffer_tokens, penalty=config.overlong_penalty
        )
    return scores


def overlong_penalty(lengths: Tensor, *, start: int, buffer: int, penalty: float) -> Tensor:
    """0 up to `start` tokens, then a line to `penalty` at `start` + `buffer` (DAPO, arXiv:2503.14476, eq. 13)."""
    return penalty * ((lengths - start) / buffer).clamp(0, 1)
