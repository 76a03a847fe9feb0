"""The learner as the driver sees it: a few async calls, each with a deadline, that end in a result or a named error.

One call at a time, off the event loop. Knows no mathematics, and of the ranks only that they answer together.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from cluster.errors import LearnerError
from cluster.remote import within
from cluster.trajectory import Trajectory
from cluster.weights import Manifest
from learner.config import LearnerConfig
from learner.ppo_learner import LearnerSettings, RankResult, model_settings
from learner.rank_group import RankGroup, StepData, build, split
from learner.training_loop import Groups, StepResult

THREAD_END_S = 2.0
"""How long the thread of a call is waited for once its ranks are gone; it must not outlive Ray."""


class PPOLearnerGroup:
    """The learners of a run. After any error the group is ended and every later call says so.

    Calls run one after the other. Each waits for all ranks, off the event loop, and raises LearnerError where one of
    them failed or died and DeadlineExceeded where they took longer than `step_timeout_s`.
    """

    def __init__(self, group: RankGroup, settings: LearnerSettings, *, first_step: int, incarnation: str) -> None:
        self._group = group
        self._config = settings.config
        self._next_step = first_step
        self._incarnation = incarnation
        self._turn = asyncio.Lock()
        self._ended_by: BaseException | None = None

    @classmethod
    async def start(
        cls,
        config: LearnerConfig,
        *,
        model_path: Path,
        reference_path: Path,
        dtype: str = "float32",
        temperature: float = 1.0,
        seed: int = 0,
        first_step: int = 1,
        checkpoint_path: Path | None = None,
        probe_token_ids: Sequence[Sequence[int]] | None = None,
        incarnation: str | None = None,
        log_dir: Path | None = None,
        critic_path: Path | None = None,
    ) -> PPOLearnerGroup:
        """Start the ranks with the weights of version `first_step` - 1: the checkpoint's, or else the model folder's.

        `probe_token_ids` are whole sequences (default: drawn from the vocabulary). Waits for all ranks to have loaded
        their models. Raises the error of one that did not, DeadlineExceeded after START_TIMEOUT_S.
        """
        settings = LearnerSettings(
            config=config,
            model=model_settings(config, Path(model_path), dtype, temperature, seed=seed, critic_path=critic_path),
            reference_path=Path(reference_path),
            seed=seed,
            version=first_step - 1,
            checkpoint_path=checkpoint_path,
            probe_token_ids=tuple(map(tuple, probe_token_ids)) if probe_token_ids else None,
            log_dir=log_dir,
        )
        group = await build(settings)
        return cls(group, settings, first_step=first_step, incarnation=incarnation or uuid.uuid4().hex)

    async def step(self, step: int, groups: Groups) -> StepResult:
        """All epochs and mini-batches on one batch; the manifest is version `step`, to be published."""
        started = time.monotonic()
        if step != self._next_step:
            raise LearnerError("learner group", f"step {step} was asked for, but the next one is {self._next_step}")
        shares = split(groups, max(1, self._config.num_learners))
        data = StepData(step=step, shares=shares)
        results: list[RankResult] = await self._run(f"step {step}", lambda: self._group.update(training_data=data))
        self._next_step += 1
        metrics = {**results[0].metrics, "learner/step_s": time.monotonic() - started}
        num_done = int(metrics["learner/num_optimizer_steps"])
        return StepResult(results[0].publication.manifest(self._incarnation), metrics, num_done)

    async def publish_initial(self) -> Manifest:
        """The manifest of the weights that the group started with."""
        publications = await self._call("publish", [{}] * self._num_ranks)
        manifest: Manifest = publications[0].manifest(self._incarnation)
        return manifest

    async def reference_kl(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """k1 to the reference policy summed over each response, in nats, from the behaviour log-probabilities."""
        if not trajectories:
            return []
        total, ranks = len(trajectories), self._num_ranks
        bounds = list(pairwise(total * rank // ranks for rank in range(ranks + 1)))
        parts = [{"trajectories": trajectories[a:b] or trajectories[:1]} for a, b in bounds]
        answers = await self._call("reference_kl", parts)
        return [kl for answer, (a, b) in zip(answers, bounds, strict=True) for kl in answer[: b - a]]

    async def save_checkpoint(self, path: Path, *, extra: Mapping[str, str] | None = None) -> None:
        """Write all that is needed to go on exactly, whole or not at all; `extra` are text files beside it by name."""
        await self._call("save_checkpoint", [{"path": path, "extra": dict(extra or {})}] * self._num_ranks)

    async def save_policy(self, path: Path) -> None:
        """Write the policy as a Hugging Face folder with its tokenizer, whole or not at all."""
        await self._call("save_policy", [{"path": path}] * self._num_ranks)

    async def shutdown(self) -> None:
        """End the ranks' processes. Write what must last before."""
        self._ended_by = self._ended_by or LearnerError("learner group", "it was shut down")
        await asyncio.to_thread(self._group.shutdown)

    @property
    def _num_ranks(self) -> int:
        return max(1, self._config.num_learners)

    async def _call(self, method: str, arguments: Sequence[Mapping[str, Any]]) -> list[Any]:
        return await self._run(method, lambda: self._group.call(method, arguments))

    async def _run(self, what: str, function: Callable[[], list[Any]]) -> list[Any]:
        """Run a blocking call in a thread until it ends or its time is over; any error ends the group."""
        timeout_s = self._config.step_timeout_s
        waited_for = f"{self._num_ranks} learners to finish {what}"
        async with self._turn:
            if self._ended_by is not None:
                raise LearnerError("learner group", f"it has ended: {self._ended_by}")
            work = asyncio.ensure_future(asyncio.to_thread(function))
            shielded = asyncio.shield(work)
            try:
                results: list[Any] = await within(shielded, timeout_s, where="learner group", waited_for=waited_for)
                return results
            except BaseException as error:
                self._ended_by = error
                self._group.shutdown()
                await asyncio.wait({asyncio.gather(work, return_exceptions=True)}, timeout=THREAD_END_S)
                raise
