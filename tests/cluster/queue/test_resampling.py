"""Test the queue: groups whose responses have equal rewards are replaced by other prompts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.errors import TrajectoryRefused
from cluster.journal.events import EQUAL_REWARDS
from cluster.ledger import QueueCounts, ResumePoint
from cluster.trajectory import Ticket, Trajectory
from tests.cluster.queue.test_trajectory_queue import admit_all, finished, make_queue, recorded_queue


def pair(ticket: Ticket, *rewards: float) -> tuple[Ticket, list[Trajectory]]:
    (one,) = finished(ticket)
    return ticket, [replace(one, uid=ticket.uid(i), reward=reward) for i, reward in enumerate(rewards)]


async def test_groups_of_equal_rewards_are_replaced_under_the_same_floor() -> None:
    queue, recorder, (first, second) = await recorded_queue(num_steps=1, max_resamples=2, max_void_share=0.0)
    await queue.put([pair(first, 0.1, 0.1 + 1e-9), pair(second, 0.0, 1.0)])
    (replacement,) = await admit_all(queue, "b")
    assert (replacement.admission_index, replacement.min_policy_version, replacement.group) == (0, 0, 2)
    await queue.put([pair(replacement, 1.0, 0.5)])
    assert [group[0].group for group in await queue.take(1)] == [2, 1]
    assert await queue.counts() == QueueCounts(3, 2, 1, 0, num_resampled=1)
    assert await queue.voided() == [], "none is reported as a fault"
    voids = [(record["group"], record["reason"]) for record in recorder.records if record["kind"] == "VOID"]
    assert voids == [(0, EQUAL_REWARDS)]


async def test_a_group_that_was_resampled_often_enough_is_trained_as_it_is() -> None:
    standing = ResumePoint(next_group=3, next_index=1, vacant=(0,), num_void=3, num_resampled=3, resampled={0: 3})
    queue = make_queue(groups_per_step=1, max_policy_lag=0, num_steps=1, max_resamples=4, standing=standing)
    await queue.published(0)
    for group in (3, 4):
        (ticket,) = await admit_all(queue)
        assert ticket.group == group
        await queue.put([pair(ticket, 1.0, 1.0)])
    assert [group[0].group for group in await queue.take(1)] == [4]
    assert await queue.counts() == QueueCounts(5, 1, 4, 0, num_resampled=4)


async def test_what_the_recorder_refuses_is_not_resampled() -> None:
    queue, recorder, (first, _) = await recorded_queue(max_resamples=2)
    recorder.error = TrajectoryRefused(first.uid(0), "a was declared dead before it sent this")
    with pytest.raises(TrajectoryRefused, match="declared dead"):
        await queue.put([pair(first, 1.0, 1.0)])
    assert (await queue.counts()).num_void == 0
