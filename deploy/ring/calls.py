"""Puts what the learner does into the run's log: TRAIN before a version is published, PUBLISH after it.

What the rollout actors do the queue records. Knows neither the log's files nor PPO.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from cluster.actors.remote import RemoteActor, within
from cluster.journal import events
from cluster.journal.events import Record
from cluster.queue.trajectory_queue import KeepsRecords
from cluster.trajectory import Trajectory
from cluster.weights.manifest import Manifest
from deploy.ring.autoscaling import WISH_TIMEOUT_S, IdleShareAutoscaler, TakesWishes
from deploy.ring.healing import RestartingLearners, Result
from deploy.ring.resuming import Resumption
from deploy.runtime.session import Session
from learner.training_loop import Groups, LearnsFromGroups, PublishesWeights, StepResult, TakesGroups

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


class PublishedWeights:
    """Publication: the store wakes the actors, the queue admits what waited for the version."""

    def __init__(self, store: RemoteActor, queue: RemoteActor) -> None:
        self._store = store
        self._queue = queue

    async def publish(self, manifest: Manifest) -> None:
        """Make a version available, then admit the groups it lets in."""
        await self._store.publish(manifest)
        await self._queue.published(manifest.version)


class Watched:
    """The learner group, with the tokens that were sampled while each step ran."""

    def __init__(self, learners: RestartingLearners, session: Session) -> None:
        self._learners = learners
        self._session = session

    async def step(self, step: int, groups: Groups) -> StepResult:
        """One step of the group."""
        before, result = await asyncio.gather(self._session.rollout_totals(), self._learners.step(step, groups))
        after = await self._session.rollout_totals()
        num_tokens = after["num_sampled_tokens"] - before["num_sampled_tokens"]
        metrics = result.metrics | {"rollout_actors/num_tokens_sampled_during_step": num_tokens}
        return replace(result, metrics=metrics)


class ToldCalls:
    """The queue, the learners and the weights as the training loop calls them; `waits_for` says what for now."""

    def __init__(self, queue: TakesGroups, learners: LearnsFromGroups, weights: PublishesWeights) -> None:
        self._queue = queue
        self._learners = learners
        self._weights = weights
        self.num_calls = 0
        self.waits_for = "its first step"

    async def take(self, step: int) -> list[list[Trajectory]]:
        """The groups of a step."""
        return await self.told(f"the groups of step {step}", self._queue.take(step))

    async def step(self, step: int, groups: Groups) -> StepResult:
        """One step."""
        return await self.told(f"the learner group to train step {step}", self._learners.step(step, groups))

    async def publish(self, manifest: Manifest) -> None:
        """Make a version available."""
        await self.told(f"version {manifest.version} to be published", self._weights.publish(manifest))

    async def told(self, what: str, call: Awaitable[Result]) -> Result:
        """The call's result; `what` is waited for meanwhile."""
        self.num_calls += 1
        self.waits_for = what
        return await call


class RecordedFirst:
    """The queue, after the steps that were trained before: those come from the log."""

    def __init__(self, queue: TakesGroups, resumed: Resumption) -> None:
        self._queue = queue
        self._trained = resumed.trained
        self._history = resumed.history

    async def take(self, step: int) -> list[list[Trajectory]]:
        """The groups of a step, in admission order."""
        if step <= self._trained:
            assert self._history is not None, "a run without a log trains nothing again"
            return await asyncio.to_thread(self._history.groups, step)
        self._history = None
        return await self._queue.take(step)


class PublishedOnce:
    """The weights, published from the version on that the run goes on with; those before were published before.

    What is trained again is compared with what was published; `note` hears of a difference.
    """

    def __init__(self, weights: PublishesWeights, resumed: Resumption, note: Callable[[str], None]) -> None:
        self._weights = weights
        self._first = resumed.trained
        self._history = resumed.history
        self._note = note

    async def publish(self, manifest: Manifest) -> None:
        """Make a version available unless it was before."""
        await self._compare(manifest)
        if manifest.version >= self._first:
            self._history = None
            await self._weights.publish(manifest)

    async def _compare(self, manifest: Manifest) -> None:
        if self._history is None or manifest.version not in self._history.versions:
            return
        recorded = await asyncio.to_thread(self._history.checksums, manifest.version)
        changed_tensors = manifest.changed_tensors(recorded)
        if changed_tensors:
            num = f"{len(changed_tensors)} of {len(recorded)} tensors"
            self._note(f"ppo: version {manifest.version} trained again differs in {num} from what was published")


class ElasticQueue:
    """The queue, as the training loop takes from it; what it waited there decides how many actors there are.

    The first step of a command is not counted: actors that have just started keep every learner waiting.
    """

    def __init__(
        self,
        queue: TakesGroups,
        policy: IdleShareAutoscaler,
        control: TakesWishes,
        *,
        num_actors: Callable[[], int],
        note: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue = queue
        self._policy = policy
        self._control = control
        self._num_actors = num_actors
        self._note = note
        self._clock = clock
        self._taken_at: float | None = None
        self._wanted = num_actors()

    async def take(self, step: int) -> list[list[Trajectory]]:
        """The groups of a step, in admission order."""
        asked_at, before = self._clock(), self._taken_at
        groups = await self._queue.take(step)
        self._taken_at = now = self._clock()
        if before is not None:
            num = self._num_actors()
            wanted = self._policy.after_step(waited_s=now - asked_at, step_s=now - before, num_actors=num)
            await self._follow(step, wanted)
        return groups

    async def _follow(self, step: int, wanted: int) -> None:
        before, self._wanted = self._wanted, wanted
        if wanted == before:
            return
        taken = await within(
            self._control.suggest_num_rollout_actors(wanted),
            WISH_TIMEOUT_S,
            where="run_control",
            waited_for="the run to take the wish",
        )
        if taken:
            why = "the learner waited for groups" if wanted > before else "the learner did not wait"
            self._note(f"step {step}: {why}; {wanted} rollout actors")
