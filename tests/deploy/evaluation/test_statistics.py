"""Intervals, paired tests and pass@k against slow or known results."""

from __future__ import annotations

import itertools
from statistics import NormalDist, fmean, stdev

import numpy as np
import pytest

from deploy.evaluation.statistics import bootstrap, paired_difference, pass_at_k


def test_a_bootstrap_interval_has_the_nominal_coverage() -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(3.0, 2.0, size=400).tolist()
    interval = bootstrap(values)
    half = NormalDist().inv_cdf(0.975) * stdev(values) / 20
    assert interval.mean == pytest.approx(fmean(values))
    assert interval.low == pytest.approx(fmean(values) - half, abs=0.03)
    assert interval.high == pytest.approx(fmean(values) + half, abs=0.03)
    covered = 0
    for seed in range(200):
        found = bootstrap(draw.random(50).tolist(), seed=seed)
        covered += found.low <= 0.5 <= found.high
    assert 0.89 <= covered / 200 <= 0.99


def test_bootstrap_is_deterministic_and_has_no_width_for_equal_values() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert bootstrap(values, seed=4) == bootstrap(values, seed=4)
    assert bootstrap([2.0] * 9) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="the mean of no values"):
        bootstrap([])


def test_the_p_value_approximates_the_exact_permutation_test() -> None:
    after, before = [1.0, 2.0, 0.5, 3.0, 1.5, 2.0, 2.5], [0.5, 1.0, 1.0, 1.0, 1.0, 2.5, 1.0]
    differences = np.array(after) - np.array(before)
    flips = [np.mean(np.array(signs) * differences) for signs in itertools.product((1, -1), repeat=7)]
    exact = fmean(abs(flip) >= abs(differences.mean()) - 1e-12 for flip in flips)
    found = paired_difference(after, before)
    assert found.p_value == pytest.approx(exact, abs=0.02)
    assert found.mean == pytest.approx(differences.mean())


def test_the_p_value_is_small_only_for_a_real_difference() -> None:
    draw = np.random.default_rng(1)
    before = draw.random(300)
    same = paired_difference((before + draw.normal(0, 0.1, 300)).tolist(), before.tolist())
    better = paired_difference((before + 0.1 + draw.normal(0, 0.1, 300)).tolist(), before.tolist())
    assert same.p_value > 0.05 > 0.001 > better.p_value > 0
    assert better.low > 0
    assert paired_difference([1.0], [1.0]).p_value == 1.0
    with pytest.raises(ValueError, match="equally many, not 2 and 1"):
        paired_difference([1.0, 2.0], [1.0])


def test_pass_at_k_equals_the_share_of_passing_draws() -> None:
    for n, c, k in [(5, 2, 1), (5, 2, 3), (4, 0, 2), (4, 4, 1), (6, 1, 6)]:
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(fmean(any(draw) for draw in draws))
    with pytest.raises(ValueError, match="pass@3 needs at least 3"):
        pass_at_k(2, 1, 3)
