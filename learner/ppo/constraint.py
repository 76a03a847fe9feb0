"""Bounds the mean cost of responses by a Lagrange multiplier (PPO-Lagrangian).

Maximises the mean reward R among policies whose mean cost C is at most d: max R - lambda C, with a multiplier lambda
that rises while C is above d and falls while it is below (Ray, Achiam and Amodei 2019, "Benchmarking Safe Exploration
in Deep Reinforcement Learning"; Safe RLHF, arXiv:2310.12773). Pure functions. Shapes: B trajectories, T tokens of the
longest.
"""

from __future__ import annotations

from torch import Tensor

from learner.config import ConstraintConfig


def updated_multiplier(multiplier: float, cost_mean: float, config: ConstraintConfig) -> float:
    """Update the multiplier after a step of mean cost `cost_mean`: projected gradient ascent on the dual.

    lambda + learning_rate (cost_mean - max_mean), clamped to 0 and `max_multiplier`. (arXiv:2310.12773, eq. 31, updates
    its logarithm instead, which does not recover from near 0 in a run of few steps.)
    """
    moved = max(0.0, multiplier + config.learning_rate * (cost_mean - config.max_mean))
    return moved if config.max_multiplier is None else min(moved, config.max_multiplier)


def less_costs(scores: Tensor, costs: Tensor, multiplier: float) -> Tensor:
    """Subtract lambda times the costs [B] from the scores [B]."""
    return scores - multiplier * costs


def rescaled(rewards: Tensor, multiplier: float) -> Tensor:
    """Divide token rewards [B, T] by 1 + lambda (arXiv:2310.12773, eq. 30).

    The rewards include costs and KL penalty. The optimal policy stays the same, and the critic's targets keep their
    scale for any lambda.
    """
    return rewards / (1 + multiplier)
