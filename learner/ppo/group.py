"""The PPO learner group as the driver calls it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from cluster.errors import LearnerError
from cluster.trajectory import Trajectory
from cluster.weights.manifest import Manifest
from learner.distributed.calls import GroupCalls
from learner.distributed.group import RankGroup, build
from learner.ppo.explanation import Explanation
from learner.ppo.rank import LearnerSettings, RankResult
from learner.ppo.rllib import TrajectoryLearner
from learner.ppo.shares import StepData, split
from learner.training_loop import Groups, StepResult


class PPOLearnerGroup(GroupCalls):
    """Calls the learners of a run. After an error the group is shut down, and later calls raise."""

    def __init__(self, group: RankGroup, settings: LearnerSettings) -> None:
        super().__init__(group, settings.config)
        self._next_step = settings.version + 1

    @classmethod
    async def start(cls, settings: LearnerSettings) -> PPOLearnerGroup:
        """Start the ranks and wait until all have loaded their models.

        The first step is `settings.version` + 1.

        Raises the error of a rank that failed to start, DeadlineExceeded after START_TIMEOUT_S.
        """
        return cls(await build(settings, TrajectoryLearner), settings)

    async def step(self, step: int, groups: Groups) -> StepResult:
        """Train all epochs and mini-batches on one batch.

        Returns the manifest of version `step`, to be published.
        """
        started = time.monotonic()
        if step != self._next_step:
            raise LearnerError("learner group", f"step {step} was asked for, but the next one is {self._next_step}")
        shares = split(groups, max(1, self._config.num_learners))
        data = StepData(step=step, shares=shares)
        results: list[RankResult] = await self._run(f"step {step}", lambda: self._group.update(data))
        self._next_step += 1
        metrics = {**results[0].metrics, "learner/step_s": time.monotonic() - started}
        num_done = int(metrics["learner/num_optimizer_steps"])
        return StepResult(results[0].manifest, metrics, num_done)

    async def explain(self, step: int, groups: Groups, uid: str) -> Explanation:
        """Train a step as `step` does, on a single rank; returns the explanation of one of its trajectories."""
        if self._num_ranks != 1:
            raise LearnerError("learner.num_learners", f"explaining a step takes one rank, not {self._num_ranks}")
        if step != self._next_step:
            raise LearnerError("learner group", f"step {step} was asked for, but the next one is {self._next_step}")
        (share,) = split(groups, 1)
        (explanation,) = await self.call_rank("explain", step, share, uid)
        self._next_step += 1
        return explanation  # type: ignore[no-any-return]

    async def publish_initial(self) -> Manifest:
        """Return the manifest of the weights that the group started with."""
        manifest: Manifest = (await self.call_rank("publish"))[0]
        return manifest

    async def set_incarnation(self, incarnation: str) -> None:
        """Publish under this incarnation from now on: a rebuilt group continues that of the one it replaces."""
        await self.call_rank("set_incarnation", incarnation)

    async def reference_kl(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """Compute k1 from the behaviour policy to the reference, summed over each response, in nats."""
        if not trajectories:
            return []
        total, ranks = len(trajectories), self._num_ranks
        bounds = list(pairwise(total * rank // ranks for rank in range(ranks + 1)))
        parts = [[trajectories[a:b] or trajectories[:1]] for a, b in bounds]
        answers = await self._call_each("reference_kl", parts)
        return [kl for answer, (a, b) in zip(answers, bounds, strict=True) for kl in answer[: b - a]]

    async def save_checkpoint(self, path: Path, *, extra: Mapping[str, str] | None = None) -> None:
        """Write a checkpoint to resume from exactly, atomically; `extra` are further text files by name."""
        await self.call_rank("save_checkpoint", path, dict(extra or {}))

    async def save_policy(self, path: Path) -> None:
        """Write the policy as a Hugging Face folder with its tokenizer, atomically."""
        await self.call_rank("save_policy", path)
