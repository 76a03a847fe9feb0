"""Puts what the learner does into the run's log: TRAIN before a version is published, PUBLISH after it.

What the rollout actors do the queue records. Knows neither the log's files nor PPO.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.actors.remote import within
from cluster.journal import events
from cluster.journal.events import Record
from cluster.queue.trajectory_queue import KeepsRecords
from cluster.weights.manifest import Manifest
from learner.training_loop import Groups, LearnsFromGroups, PublishesWeights, StepResult

RECORD_TIMEOUT_S = 600.0


class RecordedLearners:
    """Learners whose steps are on the disk, as trained, before anybody hears of their results."""

    def __init__(self, learners: LearnsFromGroups, recorder: KeepsRecords) -> None:
        self._learners = learners
        self._recorder = recorder

    async def step(self, step: int, groups: Groups) -> StepResult:
        """One step, recorded."""
        result = await self._learners.step(step, groups)
        await _record(self._recorder, events.train(step, groups))
        return result


class RecordedWeights:
    """Weights whose publications are recorded."""

    def __init__(self, weights: PublishesWeights, recorder: KeepsRecords) -> None:
        self._weights = weights
        self._recorder = recorder

    async def publish(self, manifest: Manifest) -> None:
        """Make a version available, then record with which checksums."""
        await self._weights.publish(manifest)
        await _record(self._recorder, [events.publish(manifest)])


async def _record(recorder: KeepsRecords, new: Sequence[Record]) -> None:
    await within(recorder.record(new), RECORD_TIMEOUT_S, where="recorder", waited_for="the disk")
