"""Test what is reported of a step's responses, and the note on a reward that never differs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.metrics import METRICS
from cluster.trajectory import Trajectory, Turn
from deploy.ring.batch_metrics import ConstantReward, batch_metrics
from tests.learner.conftest import make_trajectory


def response(reward: float, length: int = 3, finish_reason: str = "stop") -> Trajectory:
    turns = [Turn(2, length)]
    return replace(
        make_trajectory(0),
        reward=reward,
        mask=[False] * 2 + [True] * length,
        turns=turns,
        finish_reason=finish_reason,
    )


def test_rewards_lengths_and_ends_of_a_step_are_reported() -> None:
    equal = [response(0.1, 3), response(0.1 + 1e-9, 9, "length")]
    turns = [replace(response(0.5, 5), turns=[Turn(2, 5, 0.5)]), response(0.0, 4)]
    found = batch_metrics([equal, turns])
    assert found == {
        "learner/reward_std": pytest.approx(0.469, abs=1e-3),
        "learner/zero_variance_share": 0.5,
        "rollout_actors/response_length_tokens": 21 / 4,
        "rollout_actors/response_length_min_tokens": 3,
        "rollout_actors/response_length_max_tokens": 9,
        "rollout_actors/cut_share": 0.25,
        "rollout_actors/ended_share": 0.75,
    }
    assert set(found) <= set(METRICS)


def test_a_reward_that_never_differs_is_noted_early_and_at_the_end() -> None:
    watch = ConstantReward(num_steps=10)
    notes = [watch.after_step(step, [response(0.3), response(0.3)]) for step in range(1, 11)]
    assert [step for step, note in enumerate(notes, 1) if note] == [3, 10]
    assert "the reward was 0.3 for every response of 10 steps" in str(notes[-1])


def test_a_reward_that_differs_once_is_not_noted() -> None:
    watch = ConstantReward(num_steps=4)
    rewards = [(0.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.0, 0.0)]
    assert [watch.after_step(step, [*map(response, pair)]) for step, pair in enumerate(rewards, 1)] == [None] * 4
