"""Statistics of an evaluation: bootstrap intervals, paired permutation tests, pass@k.

Pure functions of the values and a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import NamedTuple

import numpy as np

NUM_RESAMPLED = 2_000
NUM_FLIPPED = 10_000
CONFIDENCE = 0.95
ROWS_AT_ONCE = 500


class Interval(NamedTuple):
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """A mean paired difference with its confidence interval and p-value (null hypothesis: no difference)."""

    mean: float
    low: float
    high: float
    p_value: float


def bootstrap(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Return the mean of independent values with its percentile bootstrap interval (Efron 1979).

    Raises ValueError if there are no values.
    """
    if not len(values):
        raise ValueError("the mean of no values is undefined")
    means = _resampled_means(np.asarray(values, np.float64), np.random.default_rng(seed))
    low, high = (float(np.quantile(means, (1 + side * CONFIDENCE) / 2)) for side in (-1, 1))
    return Interval(float(np.mean(values)), low, high)


def _resampled_means(values: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    sizes = [min(ROWS_AT_ONCE, NUM_RESAMPLED - first) for first in range(0, NUM_RESAMPLED, ROWS_AT_ONCE)]
    parts = [values[draw.integers(len(values), size=(size, len(values)))].mean(1) for size in sizes]
    means: np.ndarray = np.concatenate(parts)
    return means


def paired_difference(after: Sequence[float], before: Sequence[float], *, seed: int = 0) -> Difference:
    """Compare paired values: mean difference, bootstrap interval, two-sided sign-flip permutation test.

    The p-value counts the observed difference among the NUM_FLIPPED drawn ones (Phipson and Smyth 2010), so it is never
    0. Raises ValueError if the lengths differ.
    """
    if len(after) != len(before):
        raise ValueError(f"paired values must be equally many, not {len(after)} and {len(before)}")
    differences = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    interval = bootstrap(differences.tolist(), seed=seed)
    draw, observed, num_as_large = np.random.default_rng(seed + 1), abs(float(differences.mean())), 0
    for first in range(0, NUM_FLIPPED, ROWS_AT_ONCE):
        size = min(ROWS_AT_ONCE, NUM_FLIPPED - first)
        signs = draw.integers(0, 2, size=(size, len(differences))) * 2 - 1
        num_as_large += int((np.abs((signs * differences).mean(1)) >= observed - 1e-12).sum())
    return Difference(*interval, (num_as_large + 1) / (NUM_FLIPPED + 1))


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Estimate, unbiased, the probability that one of k of n samples passes (arXiv:2107.03374, eq. 1).

    Raises ValueError if k is larger than n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, not {num_samples}")
    return 1.0 - comb(num_samples - num_passed, k) / comb(num_samples, k)
