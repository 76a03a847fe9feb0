"""The three calls of the training loop: take a step's groups, train on them, publish the version.

The effects of each call happen in the order in which its method lists them; that order is what makes a killed run
resumable. Republication after a restart of the learner group uses the same `publish`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from cluster.actors.remote import within
from cluster.journal import events
from cluster.journal.events import Record
from cluster.queue.protocol import ConsumerQueue
from cluster.queue.trajectory_queue import KeepsRecords
from cluster.trajectory import Trajectory
from cluster.weights.manifest import Manifest
from deploy.ring.autoscaling import Autoscaler
from deploy.ring.resuming import Resumption
from learner.training_loop import Groups, LearnsFromGroups, PublishesWeights, StepResult

RECORD_TIMEOUT_S = 600.0
SAMPLED_DURING_STEP = "rollout_actors/num_tokens_sampled_during_step"


class AdmitsGroups(ConsumerQueue, Protocol):
    """The trajectory queue."""

    def published(self, version: int) -> Awaitable[None]:
        """Admit the groups that waited for this version."""


class RingCalls:
    """Calls queue, learners, weight store and journal for the training loop.

    `waits_for` names the call in progress and `num_calls` counts calls; the watchdog reads both. `sampled_tokens`
    returns the tokens sampled so far by all rollout actors.
    """

    def __init__(
        self,
        *,
        queue: AdmitsGroups,
        learners: LearnsFromGroups,
        store: PublishesWeights,
        recorder: KeepsRecords,
        resumed: Resumption | None = None,
        autoscaler: Autoscaler | None = None,
        sampled_tokens: Callable[[], Awaitable[float]] | None = None,
        note: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue = queue
        self._learners = learners
        self._store = store
        self._recorder = recorder
        self._trained = resumed.trained if resumed else 0
        self._history = resumed.history if resumed else None
        self._autoscaler = autoscaler
        self._sampled_tokens = sampled_tokens
        self._note = note
        self._clock = clock
        self.num_calls = 0
        self.waits_for = "its first call"

    async def take(self, step: int) -> list[list[Trajectory]]:
        """Return the groups of a step in admission order. Steps trained before the restart come from the journal."""
        if step <= self._trained:
            return await self._journaled_groups(step)
        with self.waiting_for(f"the groups of step {step}"):
            asked_at = self._clock()
            groups = await self._queue.take(step)
            waited_s = self._clock() - asked_at
        if self._autoscaler is not None:
            await self._autoscaler.after_take(step, waited_s)
        return groups

    async def step(self, step: int, groups: Groups) -> StepResult:
        """Train one step. Its TRAIN records are on disk before the result is returned."""
        with self.waiting_for(f"the learner group to train step {step}"):
            result = await self._trained_while_counting(step, groups)
            await self._record(events.train(step, groups))
        return result

    async def publish(self, manifest: Manifest) -> None:
        """Publish a version, unless it was published before the restart; PUBLISH is recorded last."""
        await self._note_if_different(manifest)
        if manifest.version < self._trained:
            return
        self._history = None
        with self.waiting_for(f"version {manifest.version} to be published"):
            await self._store.publish(manifest)
            await self._queue.published(manifest.version)
            await self._record([events.publish(manifest)])

    @contextlib.contextmanager
    def waiting_for(self, call: str) -> Iterator[None]:
        """Name the call in progress; a nested call, such as a republication, is named while it lasts."""
        self.num_calls += 1
        before, self.waits_for = self.waits_for, call
        try:
            yield
        finally:
            self.waits_for = before

    async def _journaled_groups(self, step: int) -> list[list[Trajectory]]:
        assert self._history is not None, "only a run with a journal trains steps again"
        with self.waiting_for(f"the groups of step {step} from the journal"):
            return await asyncio.to_thread(self._history.groups, step)

    async def _trained_while_counting(self, step: int, groups: Groups) -> StepResult:
        if self._sampled_tokens is None:
            return await self._learners.step(step, groups)
        before, result = await asyncio.gather(self._sampled_tokens(), self._learners.step(step, groups))
        num_tokens = await self._sampled_tokens() - before
        return replace(result, metrics=result.metrics | {SAMPLED_DURING_STEP: num_tokens})

    async def _note_if_different(self, manifest: Manifest) -> None:
        """Compare a version that was trained again with the one that was published before the restart."""
        if self._history is None or manifest.version not in self._history.versions:
            return
        recorded = await asyncio.to_thread(self._history.checksums, manifest.version)
        changed_tensors = manifest.changed_tensors(recorded)
        if changed_tensors:
            num = f"{len(changed_tensors)} of {len(recorded)} tensors"
            self._note(f"ppo: version {manifest.version} trained again differs in {num} from the published one")

    async def _record(self, records: Sequence[Record]) -> None:
        await within(self._recorder.record(records), RECORD_TIMEOUT_S, where="recorder", waited_for="the disk")
