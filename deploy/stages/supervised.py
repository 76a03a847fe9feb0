"""The stages before PPO: model and data from their builders, SFT, preferences; and how a supervised one is run.

Each leaves one artefact in the run directory, whole or not at all; its presence is what "done" means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cluster.data.datasets import Source
from deploy.data.prompts import say_broken
from deploy.run.artifacts import data_path, model_path
from deploy.run.directory import checkpoint_step
from deploy.runtime.session import Session, dtype_of

if TYPE_CHECKING:
    from learner.supervised.group import SupervisedLearnerGroup


async def run_sft(session: Session) -> None:
    """Supervised fine-tuning into `sft/`."""
    config, run = session.config, session.run
    session.view.stage("sft", config.sft.num_steps)
    data = [
        Source(data_path(config, run.path, "sft", name), task.weight)
        for name, task in config.by_task().items()
        if task.sft or task.builder
    ]
    model, output = model_path(config, run.path), run.path / "sft"
    result = await train(session, Supervised("sft", "sft", model=model, data=data, output=output))
    run.update_summary({f"sft.{name}": value for name, value in result.items()})
    if "best_step" in result:
        session.view.note(f"sft: held-out loss {result['held_out_loss']:.4f} at step {result['best_step']:,.0f}, kept")


@dataclass(frozen=True, slots=True)
class Supervised:
    """What a supervised stage trains, on what and into what; metrics and checkpoints are kept under `name`.

    `data` are its `sources`; the others are as in `SupervisedSettings`, without the endings _path.
    """

    stage: Literal["sft", "reward_model"]
    name: str
    model: Path
    data: Sequence[Source]
    output: Path
    fresh: Path | None = None
    more: Path | None = None
    by_prompt: bool = False
    member: int = 0


async def train(session: Session, task: Supervised) -> dict[str, float]:
    """Run a supervised stage on learners of its own; returns what they yielded beside its steps.

    A stage that goes on from a checkpoint yields some steps again; what is recorded already is not recorded twice.
    """
    result: dict[str, float] = {}
    newest = session.run.newest_checkpoint(task.name)
    recorded = {row["step"] for row in session.run.metrics() if row["stage"] == task.name} if newest else set()
    if newest:
        session.view.note(f"{task.name}: goes on after step {checkpoint_step(newest):,}")
    learners = await _start_learners(session, task)
    try:
        async for metrics in learners.train():
            if "step" not in metrics:
                result |= metrics
                _say_what_was_cut(session, task.name, metrics)
            elif metrics["step"] not in recorded:
                session.log_step(task.name, metrics)
    finally:
        await learners.shutdown()
    return result


async def _start_learners(session: Session, task: Supervised) -> SupervisedLearnerGroup:
    """The learners of a stage. Brings RLlib and torch into this process; commands without a stage are spared that."""
    with session.start_up.phase("imports"):
        from learner.supervised.group import SupervisedLearnerGroup
        from learner.supervised.rank import SupervisedSettings

    config, path = session.config, session.run.path
    settings = SupervisedSettings(
        config=config.learner,
        stage=getattr(config, task.stage),
        model_path=task.model,
        sources=tuple(task.data),
        output_path=task.output,
        seed=config.run.seed,
        dtype=dtype_of(config, task.model),
        checkpoints_path=path / "checkpoints" / task.name,
        fresh_path=task.fresh,
        more_path=task.more,
        by_prompt=task.by_prompt,
        member=task.member,
        reading=config.data.reading(),
        log_dir=path / "logs",
    )
    return await SupervisedLearnerGroup.start(settings)


def _say_what_was_cut(session: Session, stage: str, counts: dict[str, float]) -> None:
    """Notes where examples were too long, broken or without a counterpart."""
    if counts.get("num_cut") or counts.get("num_dropped"):
        kept = f"{counts['num_examples']:,} examples kept"
        session.view.note(f"{stage}: {kept}, {counts['num_cut']:,} of them cut, {counts['num_dropped']:,} dropped")
    if num := counts.get("num_broken"):
        say_broken(session, stage, num, f"logs/broken_rows_{stage.partition('/')[0]}.txt")
    if num := counts.get("num_unpaired"):
        session.view.note(f"{stage}: {num:,.0f} rows with a label have no counterpart: left out")
