"""Restarts the learner group if a learner dies or hangs.

The new group starts from the newest checkpoint, trains the later steps again from the run's journal without publishing
them, and then repeats the call that failed. The engines keep sampling meanwhile. An error that a learner reports does
not restart the group: the new group would fail in the same way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from cluster.errors import AntiphonError, DeadlineExceeded, LearnerDied, LearnerError
from cluster.journal.history import History
from cluster.trajectory import Trajectory, write_trajectories
from cluster.weights.manifest import Manifest
from deploy.run.directory import RunDirectory
from deploy.run.layout import RECORDS
from deploy.run.stages import checkpoint_step
from learner.config import LearnerConfig
from learner.ppo.group import PPOLearnerGroup
from learner.training_loop import Groups, StepResult

RESTARTED_AFTER = (LearnerDied, DeadlineExceeded)
NUM_RESTARTS = "num_learner_restarts"
Result = TypeVar("Result")
Publish = Callable[[Manifest], Awaitable[None]]


class RestartingLearners:
    """The learner group of a run; restarted up to `learner.max_restarts` times if it dies or hangs.

    `start(checkpoint, first_step)` starts a new group; `publish` publishes the current version again after a restart.
    Before a step is requested, the step before it must be in the journal. A learner inside this process cannot be
    killed, so it is not restarted.
    """

    def __init__(
        self,
        group: PPOLearnerGroup,
        start: Callable[[Path | None, int], Awaitable[PPOLearnerGroup]],
        *,
        config: LearnerConfig,
        run: RunDirectory,
        version: int,
        publish: Publish,
        note: Callable[[str], None],
    ) -> None:
        self._group = group
        self._start = start
        self._restarts_left = config.max_restarts if config.num_learners else 0
        self._run = run
        self._version = version
        self._publish = publish
        self._note = note
        self._published: Manifest | None = None
        self.num_restarts = int(run.summary().get(NUM_RESTARTS, 0))
        run.update_summary({NUM_RESTARTS: self.num_restarts})

    async def step(self, step: int, groups: Groups) -> StepResult:
        """Train all epochs and mini-batches of one batch. If an error names trajectories, write it to RUN/failed."""
        result = await self._restarted(lambda: self._train(step, groups))
        self._version = step
        self._published = result.manifest
        return result

    async def publish_initial(self) -> Manifest:
        """Return the manifest of the weights that the group started with."""
        self._published = await self._restarted(lambda: self._group.publish_initial())
        return self._published

    async def reference_kl(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """Return the KL to the reference policy summed over each response, in nats (k1 estimator)."""
        return await self._restarted(lambda: self._group.reference_kl(trajectories))

    async def save_checkpoint(self, path: Path, *, extra: Mapping[str, str] | None = None) -> None:
        """Write everything needed to resume exactly; the folder appears complete or not at all."""
        await self._restarted(lambda: self._group.save_checkpoint(path, extra=extra))

    async def save_policy(self, path: Path) -> None:
        """Write the policy and its tokenizer as a Hugging Face folder; it appears complete or not at all."""
        await self._restarted(lambda: self._group.save_policy(path))

    async def shutdown(self) -> None:
        """Stop the ranks' processes."""
        await self._group.shutdown()

    async def _train(self, step: int, groups: Groups) -> StepResult:
        try:
            return await self._group.step(step, groups)
        except LearnerError as error:
            if not error.uids:
                raise
            raise await asyncio.to_thread(keep_batch, self._run.path, step, groups, error) from error

    async def _restarted(self, call: Callable[[], Awaitable[Result]]) -> Result:
        """Return the result of `call`; restart the group and repeat the call while the budget lasts."""
        error: AntiphonError | None = None
        while True:
            try:
                if error is not None:
                    await self._rebuild(error)
                return await call()
            except RESTARTED_AFTER as failure:
                if not self._restarts_left:
                    raise
                self._restarts_left -= 1
                self.num_restarts += 1
                self._run.update_summary({NUM_RESTARTS: self.num_restarts})
                error = failure

    async def _rebuild(self, error: AntiphonError) -> None:
        """Start a new group at the current version, print a note, and publish its weights again if needed."""
        started = time.monotonic()
        await self._group.shutdown()
        checkpoint = self._run.newest_checkpoint("ppo")
        kept = checkpoint_step(checkpoint) if checkpoint else 0
        self._group = await self._start(checkpoint, kept + 1)
        manifest = await self._group.publish_initial()
        history = await asyncio.to_thread(History, self._run.path / RECORDS)
        for step in range(kept + 1, self._version + 1):
            manifest = (await self._train(step, await asyncio.to_thread(history.groups, step))).manifest
        origin = f"checkpoint step {kept}" if checkpoint else "the start"
        num = self._version - kept
        again = f"{num} step{'' if num == 1 else 's'} trained again in {time.monotonic() - started:.0f} s"
        self._note(f"{error}; rebuilt from {origin}, {again}")
        if self._published is not None:
            await self._publish_again(self._published, manifest)

    async def _publish_again(self, before: Manifest, manifest: Manifest) -> None:
        """Publish the current version from the new group: the old group's tensors were lost with its process.

        If the bits are the same, so is the incarnation, and actors that hold the version do not reload it.
        """
        changed_tensors = manifest.changed_tensors(before.checksums())
        if changed_tensors:
            self._note(
                f"learner group: version {manifest.version} trained again differs in {len(changed_tensors)} of "
                f"{len(manifest.tensors)} tensors; it is published again and the actors reload"
            )
        else:
            await self._group.set_incarnation(before.incarnation)
            manifest = replace(manifest, incarnation=before.incarnation)
        self._published = manifest
        await self._publish(manifest)


def keep_batch(run_path: Path, step: int, groups: Groups, error: LearnerError) -> LearnerError:
    """Write a step's trajectories to RUN/failed, those that the error names first; return the error with the path."""
    path = run_path / "failed" / f"step-{step:06d}.arrow"
    named = set(error.uids)
    trajectories = [trajectory for group in groups for trajectory in group]
    trajectories.sort(key=lambda trajectory: trajectory.uid not in named)
    try:
        write_trajectories(path, trajectories)
        kept = f"antiphon inspect {path}"
    except OSError as failure:
        kept = f"its batch could not be written to {path}: {failure.strerror}"
    return LearnerError(error.where, f"{error.what} ({kept})", uids=error.uids)
