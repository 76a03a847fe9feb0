"""Scores are normalised and shaped as by plain Python on the values in order."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.config import LearnerConfig
from learner.ppo.shaping import RunningMoments, normalized_scores, overlong_penalty, shaped_scores

NUMBERS = st.floats(-1e3, 1e3, allow_subnormal=False)


def alone(tensor: Tensor) -> Tensor:
    """Sum over ranks, with one rank."""
    return tensor


def normalized(scores: list[float], moments: RunningMoments) -> list[float]:
    values = torch.tensor(scores, dtype=torch.float64)
    found: list[float] = normalized_scores(
        values, [(torch.ones(len(scores), dtype=torch.bool), moments)], alone
    ).tolist()
    return found


def shaped(scores: list[float], **settings: Any) -> list[float]:
    values = torch.tensor(scores, dtype=torch.float64)
    lengths, ends = torch.arange(1, len(scores) + 1), torch.arange(len(scores)) % 2 == 0
    config = LearnerConfig(**settings)
    found: list[float] = shaped_scores(values, lengths=lengths, ends=ends, config=config).tolist()
    return found


@given(st.lists(st.lists(NUMBERS, min_size=1, max_size=6), min_size=1, max_size=5))
def test_running_moments_cover_all_values_so_far(batches: list[list[float]]) -> None:
    moments, so_far = RunningMoments(), []
    for batch in batches:
        moments.update(torch.tensor(batch), lambda tensor: tensor)
        so_far += torch.tensor(batch).tolist()
    assert moments.count == len(so_far)
    assert moments.mean == pytest.approx(statistics.fmean(so_far), rel=1e-6, abs=1e-6)
    deviation = statistics.stdev(so_far) if len(so_far) > 1 else 0.0
    assert moments.deviation == pytest.approx(deviation, rel=1e-6, abs=1e-6)


def test_moments_of_two_ranks_equal_those_of_one_and_are_restored() -> None:
    values = torch.tensor([1.0, 4.0, -2.0, 0.5])
    one, resumed = RunningMoments(), RunningMoments()
    one.update(values, lambda tensor: tensor)

    def other_rank(tensor: Tensor) -> Tensor:
        """Sum over two ranks, of which the other has the last two values."""
        rest = values[2:].double()
        mine = torch.stack([rest.new_tensor(2), rest.sum()])
        return tensor + (mine if tensor.ndim else (rest - values.double().mean()).square().sum())

    half = RunningMoments()
    half.update(values[:2], other_rank)
    assert half.state().tolist() == pytest.approx(one.state().tolist())
    resumed.load(one.state())
    for moments in (one, resumed):
        moments.update(values * 3, lambda tensor: tensor)
    assert torch.equal(one.state(), resumed.state())


def test_scores_are_normalised_by_all_steps_so_far_and_clipped() -> None:
    moments = RunningMoments()
    normalized([0.0, 2.0], moments)
    so_far = [0.0, 2.0, 4.0, 30.0]
    expected = [(x - statistics.fmean(so_far)) / statistics.stdev(so_far) for x in (4.0, 30.0)]
    assert normalized([4.0, 30.0], moments) == pytest.approx(expected)
    assert shaped([3.0, -3.0], reward_clip=2.0) == [2.0, -2.0]


@given(st.lists(st.lists(st.tuples(st.booleans(), NUMBERS), min_size=1, max_size=6), min_size=1, max_size=4))
def test_each_part_is_normalised_by_its_own_scores_so_far(batches: list[list[tuple[bool, float]]]) -> None:
    kept, so_far = (RunningMoments(), RunningMoments()), ([], [])  # type: tuple[RunningMoments, ...], tuple[list[float], ...]
    for batch in batches:
        scores = torch.tensor([score for _, score in batch], dtype=torch.float64)
        second = torch.tensor([is_second for is_second, _ in batch])
        found = normalized_scores(scores, [(~second, kept[0]), (second, kept[1])], alone).tolist()
        for is_second, score in batch:
            so_far[is_second].append(score)
        for (is_second, score), value in zip(batch, found, strict=True):
            own = so_far[is_second]
            deviation = statistics.stdev(own) if len(own) > 1 else 0.0
            if deviation > 1e-3 or len(set(own)) == 1:
                assert value == pytest.approx((score - statistics.fmean(own)) / (deviation + 1e-8), rel=1e-5, abs=1e-4)


def test_a_part_without_a_score_keeps_its_statistics() -> None:
    moments = RunningMoments()
    normalized([1.0, 3.0], moments)
    before = moments.state().tolist()
    normalized_scores(torch.tensor([9.0]), [(torch.tensor([False]), moments)], alone)
    assert moments.state().tolist() == before


def test_equal_scores_normalise_to_zero() -> None:
    assert normalized([5.0, 5.0, 5.0], RunningMoments()) == [0.0, 0.0, 0.0]


def test_penalties_for_length_are_subtracted_after_the_clip() -> None:
    assert shaped([9.0, 9.0], reward_clip=1.0, missing_eos_penalty=0.5) == [1.0, 0.5]
    overlong = {"overlong_tokens": 2, "overlong_buffer_tokens": 2, "overlong_penalty": 0.8}
    assert shaped([1.0] * 5, **overlong) == pytest.approx([1.0, 1.0, 0.6, 0.2, 0.2])


def test_the_overlong_penalty_is_dapos() -> None:
    lengths = torch.tensor([0, 10, 15, 20, 99])
    found = overlong_penalty(lengths, start=10, buffer=10, penalty=1.0)
    assert found.tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("score", [0.1, 1e7])
def test_equal_scores_are_normalised_to_exactly_zero(score: float) -> None:
    moments = RunningMoments()
    for _ in range(3):
        assert normalized([score] * 7, moments) == [0.0] * 7
