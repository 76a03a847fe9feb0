"""Writes the checkpoints of a PPO run and decides which of them stay."""

from __future__ import annotations

import json

from cluster.ledger import QueueCounts
from deploy.evaluation.held_out import HeldOut
from deploy.ring.healing import RestartingLearners
from deploy.ring.resuming import POSITION
from deploy.runtime.session import Session


class Checkpoints:
    """Checkpoints of a run: the newest two, the best on held-out prompts, and those of every `keep_every_steps`."""

    def __init__(self, session: Session, learners: RestartingLearners) -> None:
        self._session = session
        self._learners = learners
        self._held_out = HeldOut(session, learners)

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is written after this step."""
        return self._is_evaluated(step) or step % self._session.config.learner.checkpoint_every_steps == 0

    async def write(self, step: int, counts: QueueCounts) -> None:
        """Write a checkpoint, evaluate it if that is due, and delete the checkpoints that need not stay."""
        config, run = self._session.config, self._session.run
        path = run.path / "checkpoints" / "ppo" / f"step-{step:06d}"
        position = {
            "num_trained": step * config.trajectory_queue.groups_per_step,
            "num_void": counts.num_void,
            "num_resampled": counts.num_resampled,
        }
        await self._learners.save_checkpoint(path, extra={POSITION: json.dumps(position)})
        is_best = self._is_evaluated(step) and await self._held_out.evaluate(step)
        best, every_steps = path if is_best else None, config.learner.keep_every_steps
        run.keep_checkpoints("ppo", newest=2, best=best, every_steps=every_steps)

    def _is_evaluated(self, step: int) -> bool:
        config = self._session.config
        return step == config.learner.num_steps or step % config.evaluation.every_steps == 0
