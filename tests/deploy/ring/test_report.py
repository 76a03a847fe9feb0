"""Test the metrics of each task and the note on short steps in a step's report."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.trajectory import Turn
from deploy.ring.report import short_step_note, task_metrics
from learner.config import LearnerConfig
from tests.learner.conftest import make_trajectory


def test_each_task_has_its_own_means_and_number_of_episodes() -> None:
    first, second, third = (make_trajectory(index) for index in range(3))
    prompt, response = third.turns[0].start, third.turns[0].length
    talk = replace(third, task="talk", reward=1.0, turns=[Turn(prompt, 1, 0.25), Turn(prompt + 1, response - 1, 0.5)])
    trajectories = [replace(first, task="sums", reward=1.0), replace(second, task="sums", reward=0.5), talk]
    found = task_metrics(["sums", "talk"], trajectories, {"tasks/sums/num_episodes": 10})
    lengths = [trajectory.num_response_tokens for trajectory in trajectories]
    assert found == {
        "tasks/sums/num_episodes": 12,
        "tasks/sums/reward_mean": 0.75,
        "tasks/sums/response_length_tokens": pytest.approx((lengths[0] + lengths[1]) / 2),
        "tasks/talk/num_episodes": 1,
        "tasks/talk/reward_mean": 1.75,
        "tasks/talk/response_length_tokens": lengths[2],
    }


def test_a_task_without_trajectories_in_a_step_has_only_its_number() -> None:
    assert task_metrics(["sums"], [], {"tasks/sums/num_episodes": 4}) == {"tasks/sums/num_episodes": 4}
    assert task_metrics([], [make_trajectory(0)], {}) == {}


@pytest.mark.parametrize(
    ("limit", "reason"), [(None, ""), (0.05, ", beyond learner.max_step_kl_nats = 0.05")], ids=["unset", "set"]
)
def test_a_short_step_is_noted_with_its_limit_if_one_is_set(limit: float | None, reason: str) -> None:
    learner = LearnerConfig(num_epochs=2, num_minibatches=2, max_step_kl_nats=limit)
    assert short_step_note(learner, 3, 1) == f"step 3 ended after 1 of 4 optimiser steps{reason}"
    assert short_step_note(learner, 3, 4) is None


def test_a_step_in_which_nothing_was_trained_is_noted() -> None:
    learner = LearnerConfig(num_epochs=2, zero_variance_groups="skip")
    what = "step 3 trained nothing: the responses to each prompt had equal rewards"
    assert short_step_note(learner, 3, 0) == what
