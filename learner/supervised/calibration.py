"""Measures accuracy and calibration of a reward model on pairs that it was not trained on.

Imports no torch.

A pair's margin is the reward of the chosen response minus that of the rejected one; its sigmoid is the probability that
the model gives to the choice (Bradley and Terry 1952).

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
    """Compute `accuracy`, `ece`, `nll` and `margin_mean` of N pairs with these rewards."""
    margins = np.asarray(chosen, dtype=np.float64) - np.asarray(rejected, dtype=np.float64)
    return {
        "accuracy": accuracy(margins),
        "ece": expected_calibration_error(margins),
        "nll": negative_log_likelihood(margins),
        "margin_mean": float(margins.mean()),
    }


def accuracy(margins: Numbers) -> float:
    """Compute the share of pairs whose chosen response has the higher reward; a tie counts half."""
    return float(_is_right(np.asarray(margins, dtype=np.float64)).mean())


def _is_right(margins: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return (np.sign(margins) + 1) / 2


def num_ties(margins: Numbers) -> int:
    """Count the pairs with equal rewards."""
    return int((np.asarray(margins, dtype=np.float64) == 0).sum())


def negative_log_likelihood(margins: Numbers) -> float:
    """Compute the mean of -log sigmoid(margin), in nats."""
    return float(np.logaddexp(0.0, -np.asarray(margins, dtype=np.float64)).mean())


def expected_calibration_error(margins: Numbers, num_bins: int = NUM_BINS) -> float:
    """Compute the expected calibration error (Guo et al. 2017, arXiv:1706.04599, eq. 3), from 0 to 1.

    The confidence in the response that the model prefers is sigmoid(|margin|); it is right if that response was chosen,
    and half right on a tie. Sums over equal-width bins of [0, 1] the gap between mean confidence and accuracy, weighted
    by the bin's share of the pairs. (Bins of the chosen response's probability would be useless: it was always chosen.)
    """
    values = np.asarray(margins, dtype=np.float64)
    confidences = np.exp(-np.logaddexp(0.0, -np.abs(values)))
    bins = np.minimum((confidences * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bins, weights=confidences - _is_right(values), minlength=num_bins)
    return float(np.abs(gaps).sum() / len(values))


def ensemble_uncertainty(margins: Sequence[Numbers]) -> float:
    """Compute how far M >= 2 members disagree.

    A margin's standard deviation over members, mean over the N pairs. Uses margins, not rewards: preferences do not
    determine each member's offset.
    """
    return float(np.asarray(margins, dtype=np.float64).std(axis=0).mean())


def reward_statistics(chosen: Numbers, rejected: Numbers) -> dict[str, float]:
    """Compute `mean`, `std` (of the population) and `num` of the rewards of both responses."""
    rewards = np.concatenate([np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)])
    return {"mean": float(rewards.mean()), "std": float(rewards.std()), "num": len(rewards)}
