"""How far a reward model's probabilities can be believed, from the rewards of pairs that it was not trained on.

A pair's margin is the reward of the chosen response less that of the rejected one; its sigmoid is the probability that
the model gives to what was chosen (Bradley and Terry 1952). Knows neither models nor files, and imports no torch.

Shapes: N pairs, M members of an ensemble.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

NUM_BINS = 10

Numbers: TypeAlias = Sequence[float] | npt.NDArray[np.float64]


def measures(chosen: Numbers, rejected: Numbers) -> dict[str, float]:
    """`accuracy`, `ece`, `nll` and `margin_mean` of N pairs with these rewards."""
    margins = np.asarray(chosen, dtype=np.float64) - np.asarray(rejected, dtype=np.float64)
    return {
        "accuracy": accuracy(margins),
        "ece": expected_calibration_error(margins),
        "nll": negative_log_likelihood(margins),
        "margin_mean": float(margins.mean()),
    }


def accuracy(margins: Numbers) -> float:
    """Share of pairs whose chosen response has the higher reward; a tie counts half."""
    return float(_is_right(np.asarray(margins, dtype=np.float64)).mean())


def _is_right(margins: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return (np.sign(margins) + 1) / 2


def num_ties(margins: Numbers) -> int:
    """Pairs with equal rewards."""
    return int((np.asarray(margins, dtype=np.float64) == 0).sum())


def negative_log_likelihood(margins: Numbers) -> float:
    """Mean of -log sigmoid(margin), in nats."""
    return float(np.logaddexp(0.0, -np.asarray(margins, dtype=np.float64)).mean())


def expected_calibration_error(margins: Numbers, num_bins: int = NUM_BINS) -> float:
    """How far confidence is from accuracy (Guo et al. 2017, arXiv:1706.04599, eq. 3), from 0 to 1.

    The confidence in the response that the model prefers is sigmoid(|margin|); it is right where that response was
    chosen, by half on a tie. In each of the equal-width bins of [0, 1] the gap between mean confidence and share of
    right ones is taken, weighted by the bin's share of the pairs. (Bins of the chosen response's own probability would
    tell nothing: it was chosen every time.)
    """
    values = np.asarray(margins, dtype=np.float64)
    confidences = np.exp(-np.logaddexp(0.0, -np.abs(values)))
    bins = np.minimum((confidences * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bins, weights=confidences - _is_right(values), minlength=num_bins)
    return float(np.abs(gaps).sum() / len(values))


def ensemble_uncertainty(margins: Sequence[Numbers]) -> float:
    """How far M >= 2 members disagree: the standard deviation over members of a pair's margin, mean over the N pairs.

    Of margins, not rewards: preferences leave each member's level open.
    """
    return float(np.asarray(margins, dtype=np.float64).std(axis=0).mean())


def reward_statistics(chosen: Numbers, rejected: Numbers) -> dict[str, float]:
    """`mean`, `std` (of the population) and `num` of the rewards of both responses."""
    rewards = np.concatenate([np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)])
    return {"mean": float(rewards.mean()), "std": float(rewards.std()), "num": len(rewards)}
