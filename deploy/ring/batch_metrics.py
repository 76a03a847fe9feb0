"""Describes the responses of a PPO step: rewards, lengths and how they ended."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

from cluster.trajectory import ROUNDING, Trajectory, have_equal_rewards
from learner.training_loop import Groups

FIRST_WARNING_STEP = 3
"""The step after which a reward that never differed is reported first."""


def batch_metrics(groups: Groups) -> dict[str, float]:
    """Return the metrics of a step's groups that need no learner."""
    trajectories = [trajectory for group in groups for trajectory in group]
    lengths = [trajectory.num_response_tokens for trajectory in trajectories]
    rewards = [trajectory.total_reward for trajectory in trajectories]
    cut_share = fmean(trajectory.finish_reason == "length" for trajectory in trajectories)
    return {
        "learner/reward_std": stdev(rewards) if len(rewards) > 1 else 0.0,
        "learner/zero_variance_share": fmean(have_equal_rewards(group) for group in groups),
        "rollout_actors/response_length_tokens": fmean(lengths),
        "rollout_actors/response_length_min_tokens": min(lengths),
        "rollout_actors/response_length_max_tokens": max(lengths),
        "rollout_actors/cut_share": cut_share,
        "rollout_actors/ended_share": 1 - cut_share,
    }


class ConstantReward:
    """Notices that every response so far got the same reward: then there is nothing to learn from."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._num_seen = 0
        self._lowest, self._highest = float("inf"), float("-inf")

    def after_step(self, step: int, trajectories: Sequence[Trajectory]) -> str | None:
        """Return a note after the third step and after the last one if the reward was the same in all of them."""
        rewards = [trajectory.total_reward for trajectory in trajectories]
        self._lowest, self._highest = min(self._lowest, *rewards), max(self._highest, *rewards)
        self._num_seen += 1
        largest = max(abs(self._lowest), abs(self._highest))
        if self._highest - self._lowest > ROUNDING * largest:
            return None
        if self._num_seen != FIRST_WARNING_STEP and step != self._num_steps:
            return None
        return (
            f"the reward was {self._highest:g} for every response of {self._num_seen} steps: the policy cannot learn "
            "from it. Check the scorer with antiphon evaluate-rewards, or make the prompts easier or harder"
        )
