"""A bound on the mean cost of responses, kept by a Lagrange multiplier: PPO-Lagrangian.

Of the policies whose mean cost C is at most d, the one of the highest mean reward R is sought: max R - lambda C, with a
multiplier lambda that rises while C is above d and falls while it is below (Ray, Achiam and Amodei 2019, "Benchmarking
Safe Exploration in Deep Reinforcement Learning"; Safe RLHF, arXiv:2310.12773). Pure functions; knows no rank and no
scorer. Shapes: B trajectories, T tokens of the longest.
"""

from __future__ import annotations

from torch import Tensor

from learner.config import ConstraintConfig


def updated_multiplier(multiplier: float, cost_mean: float, config: ConstraintConfig) -> float:
    """The multiplier after a step whose responses cost `cost_mean`: a step of projected gradient ascent on the dual.

    lambda + learning_rate (cost_mean - max_mean), held within 0 and `max_multiplier`. (arXiv:2310.12773, eq. 31, moves
    its logarithm instead, which never comes back from near 0 in a run of few steps.)
    """
    moved = max(0.0, multiplier + config.learning_rate * (cost_mean - config.max_mean))
    return moved if config.max_multiplier is None else min(moved, config.max_multiplier)


def less_costs(scores: Tensor, costs: Tensor, multiplier: float) -> Tensor:
    """The scores [B] less lambda times the costs [B]."""
    return scores - multiplier * costs


def rescaled(rewards: Tensor, multiplier: float) -> Tensor:
    """Token rewards [B, T] with costs and KL penalty in them, over 1 + lambda (arXiv:2310.12773, eq. 30).

    All of them alike, so that the best policy stays the same, and the critic's targets keep their size however large
    lambda is.
    """
    return rewards / (1 + multiplier)
