"""Normalises and clips scores and subtracts penalties, before advantages are computed from them.

Pure functions, except for the running statistics, which are the same on every rank. Shapes: B trajectories of this
rank, in admission order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cluster.trajectory import ROUNDING
from learner.config import LearnerConfig
from learner.ppo.advantages import AllSum


class RunningMoments:
    """Mean and unbiased variance of all values so far, over all ranks (Chan, Golub and LeVeque 1979).

    Depends only on the values and their batches: the number of ranks and micro-batches changes only rounding.
    """

    def __init__(self) -> None:
        self.count = self.mean = self._squares = 0.0

    @property
    def deviation(self) -> float:
        """The standard deviation; 0 for fewer than two values."""
        return (self._squares / (self.count - 1)) ** 0.5 if self.count > 1 else 0.0

    def update(self, values: Tensor, all_sum: AllSum) -> None:
        """Add this rank's values [B] of a batch; B may be 0 on any rank. Collective."""
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
        """Return the state [3], float64."""
        return torch.tensor([self.count, self.mean, self._squares], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """Restore what `state` returned."""
        self.count, self.mean, self._squares = state.tolist()


def normalized_scores(scores: Tensor, parts: Sequence[tuple[Tensor, RunningMoments]], all_sum: AllSum) -> Tensor:
    """Normalise the scores [B] of each part by its running mean and deviation. Collective.

    Each part is a mask [B] and its statistics, which are updated first, so that the first batch is normalised too.
    Scores that have differed by no more than rounding so far give 0.
    """
    normalized = scores.clone()
    for chosen, moments in parts:
        moments.update(scores[chosen], all_sum)
        if moments.deviation <= ROUNDING * abs(moments.mean):
            normalized[chosen] = 0.0
        else:
            normalized[chosen] = (scores[chosen] - moments.mean) / (moments.deviation + 1e-8)
    return normalized


def shaped_scores(scores: Tensor, *, lengths: Tensor, ends: Tensor, config: LearnerConfig) -> Tensor:
    """Clip the scores [B], then subtract the penalties, by the settings.

    `lengths` are numbers of sampled tokens; `ends` is true if the response ended with the end-of-sequence token.
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
    """Compute DAPO's length penalty (arXiv:2503.14476, eq. 13).

    0 up to `start` tokens, then linear to `penalty` at `start` + `buffer`.
    """
    return penalty * ((lengths - start) / buffer).clamp(0, 1)
