"""The DPO stage: trains the policy on preferences, without a reward model and without sampling."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from cluster.data.datasets import Source
from cluster.errors import InputError
from cluster.files import replacing
from deploy.config.schema import RunConfig
from deploy.run.artifacts import dpo_reference_path, preferences_path
from deploy.run.directory import RunDirectory
from deploy.run.layout import PREFERENCES
from deploy.runtime.session import Session
from deploy.stages.reward_model import read_feedback
from deploy.stages.supervised import StartLearners, Supervised, start_learners, train


async def run_dpo(session: Session, *, start: StartLearners = start_learners) -> None:
    """Train on the run's preferences and human feedback; writes `dpo/`. Resumes from its newest checkpoint."""
    config, run = session.config, session.run
    if run.newest_checkpoint("ppo") is not None:
        raise InputError("dpo", "PPO of this run began from another policy: give the run another --name")
    session.view.stage("dpo", 0)
    preferences, feedback = preferences_path(config, run.path), keep_feedback(config, run)
    if feedback is not None and not preferences.exists():
        preferences, feedback = feedback, None
    if not preferences.exists():
        raise InputError("dpo", f"no preferences: set data.preferences, or label pairs (antiphon label {run.path})")
    task = Supervised(
        "dpo",
        "dpo",
        model=dpo_reference_path(config, run.path),
        data=[Source(preferences)],
        output=run.path / "dpo",
        more=feedback,
    )
    result = await train(session, task, start=start)
    run.update_summary({f"dpo.{name}": value for name, value in result.items()})
    if "held_out_accuracy" in result:
        session.view.note(
            f"dpo: prefers the better response on {result['held_out_accuracy']:.1%} of held-out rows, held-out loss "
            f"{result['held_out_loss']:.4f}"
        )


def keep_feedback(config: RunConfig, run: RunDirectory) -> Path | None:
    """Copy the human preferences beside the checkpoints, so that a resumed stage trains on the same; None without any.

    Answers that are given later are used by a stage that starts over.
    """
    copy = run.path / "checkpoints" / "dpo" / PREFERENCES
    begun = copy.exists() or run.newest_checkpoint("dpo") is not None
    if not begun:
        table = read_feedback(config, run.path)
        if table is not None:
            copy.parent.mkdir(parents=True, exist_ok=True)
            with replacing(copy) as partial:
                pq.write_table(table, partial)
    return copy if copy.exists() else None
