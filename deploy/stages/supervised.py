"""Runs a supervised stage (SFT, DPO, reward model) on its own learner group and reports its steps."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from cluster.data.datasets import Source
from deploy.data.prompts import note_broken
from deploy.run.layout import REFERENCE
from deploy.run.stages import checkpoint_step
from deploy.runtime.session import Session, dtype_of

REFERENCE_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class Supervised:
    """What a supervised stage trains, on which data, and where it writes the result.

    Metrics and checkpoints are kept under `name`. `data` are the `sources` of `SupervisedSettings`; the other fields
    are as there, without the suffix _path.
    """

    stage: Literal["sft", "dpo", "reward_model"]
    name: str
    model: Path
    data: Sequence[Source]
    output: Path
    fresh: Path | None = None
    more: Path | None = None
    by_prompt: bool = False
    member: int = 0


class Learners(Protocol):
    """A started learner group of a supervised stage."""

    def train(self) -> AsyncIterator[dict[str, float]]:
        """Train; yields each step's metrics, which include `step`, and other results without `step`."""

    async def shutdown(self) -> None:
        """Stop the ranks' processes."""


StartLearners = Callable[[Session, Supervised], Awaitable[Learners]]


async def start_learners(session: Session, task: Supervised) -> Learners:
    """Start the learner group of a stage. Imports RLlib and torch, so that commands without the stage need not."""
    with session.start_up.phase("imports"):
        from learner.place import Place
        from learner.supervised.group import SupervisedLearnerGroup
        from learner.supervised.rank import SupervisedSettings

    config, path = session.config, session.run.path
    settings = SupervisedSettings(
        config=config.learner,
        stage=getattr(config, task.stage),
        place=Place(task.model, dtype_of(config, task.model), config.run.seed, log_dir=path / "logs"),
        sources=tuple(task.data),
        output_path=task.output,
        checkpoints_path=path / "checkpoints" / task.name,
        fresh_path=task.fresh,
        more_path=task.more,
        by_prompt=task.by_prompt,
        member=task.member,
        reference_path=path / REFERENCE,
        reading=config.data.reading(),
    )
    with session.view.starting("learner"):
        return await SupervisedLearnerGroup.start(settings)


async def train(session: Session, task: Supervised, *, start: StartLearners = start_learners) -> dict[str, float]:
    """Run a supervised stage; returns the results that its learners yield beside the steps.

    A stage that resumes from a checkpoint repeats some steps; steps that are already in metrics.jsonl are not written
    again.
    """
    result: dict[str, float] = {}
    newest = session.run.newest_checkpoint(task.name)
    recorded = {row["step"] for row in session.run.metrics() if row["stage"] == task.name} if newest else set()
    if newest:
        session.view.note(f"{task.name}: resumes after step {checkpoint_step(newest):,}")
    reference = _ReferenceNotes(session, task.name)
    learners = await start(session, task)
    try:
        async for metrics in learners.train():
            if "num_reference" in metrics:
                reference.print(metrics)
            elif "step" not in metrics:
                result |= metrics
                _note_plan(session, task, metrics)
                _note_left_out(session, task.name, metrics)
            elif metrics["step"] not in recorded:
                session.log_step(task.name, metrics)
    finally:
        await learners.shutdown()
    return result


def _note_plan(session: Session, task: Supervised, counts: dict[str, float]) -> None:
    """Show the number of steps, and print the learning rate if it was chosen by the model's size."""
    if "num_steps" not in counts:
        return
    session.view.expect(int(counts["num_steps"]))
    if getattr(session.config, task.stage).learning_rate is None:
        rate = f"learning rate {counts['learning_rate']:.1e}, by the model's size ({task.stage}.learning_rate)"
        session.view.note(f"{task.name}: {counts['num_steps']:,.0f} steps, {rate}")


class _ReferenceNotes:
    """Prints how many rows the reference policy of DPO has computed: at first, then every few seconds, and at last."""

    def __init__(self, session: Session, stage: str) -> None:
        self._session = session
        self._stage = stage
        self._printed_at = -math.inf

    def print(self, progress: dict[str, float]) -> None:
        """Print a note if one is due."""
        done, total = progress["num_reference"], progress["num_rows"]
        if done < total and time.monotonic() - self._printed_at < REFERENCE_EVERY_S:
            return
        self._printed_at = time.monotonic()
        self._session.view.note(f"{self._stage}: reference log-probabilities of {done:,.0f} of {total:,.0f} rows")


def _note_left_out(session: Session, stage: str, counts: dict[str, float]) -> None:
    """Print a note if examples were too long, broken or unpaired."""
    if counts.get("num_cut") or counts.get("num_dropped"):
        kept = f"{counts['num_examples']:,} examples kept"
        session.view.note(f"{stage}: {kept}, {counts['num_cut']:,} of them cut, {counts['num_dropped']:,} dropped")
    if num := counts.get("num_broken"):
        note_broken(session, stage, num, f"logs/broken_rows_{stage.partition('/')[0]}.txt")
    if num := counts.get("num_unpaired"):
        session.view.note(f"{stage}: {num:,.0f} rows with a label have no counterpart: left out")
