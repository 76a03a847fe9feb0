"""The training loop: take a batch, train a step, publish the weights, report.

Imports neither Ray nor RLlib.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.queue.protocol import ConsumerQueue
from cluster.trajectory import Trajectory
from cluster.weights.manifest import Manifest

Groups = Sequence[Sequence[Trajectory]]


@dataclass(frozen=True, slots=True)
class StepResult:
    """Result of a step: the version to publish, metrics by full name, the number of optimiser steps."""

    manifest: Manifest
    metrics: dict[str, float]
    num_optimizer_steps: int


class PublishesWeights(Protocol):
    """The weights' interface for the loop."""

    def publish(self, manifest: Manifest) -> Awaitable[None]:
        """Make a version available to the actors and admit the groups that waited for it."""


class LearnsFromGroups(Protocol):
    """The learner group's interface for the loop."""

    def step(self, step: int, groups: Groups) -> Awaitable[StepResult]:
        """Train all epochs and mini-batches on one batch."""


async def train(
    *,
    first_step: int,
    num_steps: int,
    learners: LearnsFromGroups,
    queue: ConsumerQueue,
    weights: PublishesWeights,
    report: Callable[[int, Groups, StepResult], Awaitable[None]],
) -> None:
    """Train steps `first_step` to `num_steps`. Waits for the queue, which the rollout actors fill.

    Publishing version s admits the groups of step s + 1 + max_policy_lag, so sampling continues during the next step.
    """
    for step in range(first_step, num_steps + 1):
        groups = await queue.take(step)
        result = await learners.step(step, groups)
        await weights.publish(result.manifest)
        await report(step, groups, result)
