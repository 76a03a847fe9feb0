"""Calibration matches known values and a slow version that follows the paper."""

from __future__ import annotations

import math
import random

import pytest

from learner.supervised.calibration import (
    ensemble_uncertainty,
    expected_calibration_error,
    measures,
    num_ties,
    reward_statistics,
)


def margin(probability: float) -> float:
    return math.log(probability / (1 - probability))


def slow_ece(margins: list[float], num_bins: int = 10) -> float:
    """Compute Guo et al. 2017, equations 2 and 3, bin by bin."""
    total = 0.0
    for m in range(num_bins):
        inside = []
        for value in margins:
            confidence = 1 / (1 + math.exp(-abs(value)))
            if m / num_bins <= confidence < (m + 1) / num_bins or (m == num_bins - 1 and confidence == 1.0):
                inside.append((confidence, 1.0 if value > 0 else 0.5 if value == 0 else 0.0))
        if inside:
            acc = sum(right for _, right in inside) / len(inside)
            conf = sum(confidence for confidence, _ in inside) / len(inside)
            total += len(inside) / len(margins) * abs(acc - conf)
    return total


def test_the_calibration_error_matches_the_papers_bins() -> None:
    draw = random.Random(0)
    for spread in (0.1, 1.0, 10.0, 100.0):
        margins = [draw.gauss(0.3, spread) for _ in range(500)] + [0.0, 0.0]
        assert expected_calibration_error(margins) == pytest.approx(slow_ece(margins), abs=1e-12)


def test_the_calibration_error_is_zero_if_accuracy_is_confidence() -> None:
    assert expected_calibration_error([margin(0.75)] * 3 + [-margin(0.75)]) == pytest.approx(0.0, abs=1e-12)
    assert expected_calibration_error([0.0, 0.0]) == 0.0


def test_the_calibration_error_is_the_gap_if_overconfident() -> None:
    assert expected_calibration_error([margin(0.95), -margin(0.95)]) == pytest.approx(0.45)
    assert expected_calibration_error([1000.0, -1000.0]) == pytest.approx(0.5)


def test_gaps_of_different_bins_do_not_cancel() -> None:
    margins = [margin(0.95), -margin(0.95), margin(0.65), margin(0.65)]
    assert expected_calibration_error(margins) == pytest.approx((0.45 + 0.35) / 2)


def test_measures_of_pairs_with_known_values() -> None:
    measured = measures([1.0, 0.0, 2.0, 3.0], [0.0, 1.0, 2.0, 1.0])
    nll = sum(math.log(1 + math.exp(-m)) for m in (1.0, -1.0, 0.0, 2.0)) / 4
    assert measured == pytest.approx({"accuracy": 2.5 / 4, "nll": nll, "margin_mean": 0.5, "ece": measured["ece"]})
    assert num_ties([1.0, 0.0, -0.0, 2.0]) == 2


def test_huge_margins_are_measured_without_overflow() -> None:
    measured = measures([1e6], [-1e6])
    assert (measured["nll"], measured["accuracy"]) == (0.0, 1.0)
    assert measures([-1e6], [1e6])["nll"] == 2e6


def test_members_that_differ_only_by_an_offset_agree() -> None:
    assert ensemble_uncertainty([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]]) == 0.0
    assert ensemble_uncertainty([[0.0, 1.0], [2.0, 1.0]]) == 0.5


def test_reward_statistics_cover_both_responses() -> None:
    assert reward_statistics([3.0, 1.0], [-1.0, 1.0]) == pytest.approx({"mean": 1.0, "std": math.sqrt(2), "num": 4})
