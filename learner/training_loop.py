"""The learner's story: take a batch, step, publish. What is made of the results is the caller's affair.

Knows neither Ray nor RLlib nor files: the queue, the weights and the learner group are whatever has their methods.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.trajectory import Trajectory
from cluster.weights.manifest import Manifest

Groups = Sequence[Sequence[Trajectory]]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step gave: the version to publish, metrics by their full names, optimiser steps done in it."""

    manifest: Manifest
    metrics: dict[str, float]
    num_optimizer_steps: int


class TakesGroups(Protocol):
    """The queue, as the loop sees it."""

    def take(self, step: int) -> Awaitable[list[list[Trajectory]]]:
        """The groups of a step, in admission order."""


class PublishesWeights(Protocol):
    """The weights, as the loop sees them."""

    def publish(self, manifest: Manifest) -> Awaitable[None]:
        """Make a version available to the actors and admit what waited for it."""


class LearnsFromGroups(Protocol):
    """The learner group, as the loop sees it."""

    def step(self, step: int, groups: Groups) -> Awaitable[StepResult]:
        """All epochs and mini-batches on one batch."""


async def train(
    *,
    first_step: int,
    num_steps: int,
    learners: LearnsFromGroups,
    queue: TakesGroups,
    weights: PublishesWeights,
    report: Callable[[int, Groups, StepResult], Awaitable[None]],
) -> None:
    """Steps `first_step` to `num_steps`. Waits for the queue, which the rollout actors fill.

    Publishing version s admits the groups of step s + 1 + max_policy_lag, so sampling goes on during the next step.
    """
    for step in range(first_step, num_steps + 1):
        groups = await queue.take(step)
        result = await learners.step(step, groups)
        await weights.publish(result.manifest)
        await report(step, groups, result)
