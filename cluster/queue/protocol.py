"""The trajectory queue's two interfaces: what a rollout actor calls and what the training loop calls.

`TrajectoryQueue` implements both. Calls may cross processes, so every method returns an awaitable.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Protocol

from cluster.trajectory import FinishedGroup, PartialGroup, Ticket, Trajectory


class ProducerQueue(Protocol):
    """The methods that a rollout actor calls."""

    def admit(self, owner: str, *, max_groups: int, timeout_s: float) -> Awaitable[list[Ticket]]:
        """Return up to `max_groups` admitted prompts, now held by `owner`; none if there are none in `timeout_s`."""

    def keep(self, owner: str, groups: Sequence[PartialGroup]) -> Awaitable[None]:
        """Save finished segments of unfinished groups; returns when they are on the disk."""

    def put(self, groups: Sequence[FinishedGroup]) -> Awaitable[None]:
        """Take all of these finished groups, or raise; returns when they are on the disk."""

    def void(self, ticket: Ticket, reason: str) -> Awaitable[None]:
        """Give a group up. Raises GroupsVoided if the run allows no more."""

    def hand_over(self, owner: str) -> Awaitable[list[int]]:
        """Return every group that `owner` holds to the queue, for other actors."""


class ConsumerQueue(Protocol):
    """The methods that the training loop calls."""

    def take(self, step: int) -> Awaitable[list[list[Trajectory]]]:
        """Return the groups of a step, in admission order."""
