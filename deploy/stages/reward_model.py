"""The reward model's stage, and `antiphon reward-model RUN`: training again on all preferences that there are by now.

Those are the run's own, and what people said since on the labelling page, which is read in one place, here. Every
version starts from the policy that PPO started from; a pair whose prompt was held out before is held out again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.data.datasets import Source
from cluster.errors import InputError
from deploy.config.schema import RunConfig
from deploy.run.artifacts import policy_path, preferences_path
from deploy.run.directory import RunDirectory
from deploy.run.layout import FEEDBACK, FINGERPRINT_FILE, HELD_OUT, PREFERENCES, TRAINING
from deploy.run.reward_models import member_folder, publish
from deploy.runtime.session import Session
from deploy.stages.supervised import Supervised, train


def begin(run: RunDirectory, config: RunConfig) -> None:
    """Lay out what will be trained on; call it before anything of the run is opened.

    What an interrupted training has left is gone on with where it had the same preferences and settings, and deleted
    where not, with the metrics of the version before.
    """
    folder, made_of = run.path / TRAINING, _made_of(config)
    feedback = _read_feedback(run.path / FEEDBACK)
    if _is_same(folder, made_of, feedback):
        return
    _clear(run)
    folder.mkdir()
    if feedback is not None:
        pq.write_table(feedback, folder / PREFERENCES)
    (folder / FINGERPRINT_FILE).write_text(json.dumps(made_of) + "\n")


def _clear(run: RunDirectory) -> None:
    """Delete what an interrupted training has left, and the metrics of the last one."""
    shutil.rmtree(run.path / TRAINING, ignore_errors=True)
    shutil.rmtree(run.path / "checkpoints" / "reward_model", ignore_errors=True)
    for stage in {row["stage"] for row in run.metrics()}:
        if stage.partition("/")[0] == "reward_model":
            run.rewind_metrics(stage, 0)


def has_feedback(run_path: Path) -> bool:
    """Whether people have been asked."""
    return (run_path / FEEDBACK).exists()


def _read_feedback(store: Path) -> pa.Table | None:
    """What people prefer, every answer a row: those who differ are the noise that label smoothing is for."""
    if not store.exists():
        return None
    from reward_service.feedback.store import read_preferences

    table = read_preferences(store).select(["prompt", "chosen", "rejected"])
    return table if table.num_rows else None


def _made_of(config: RunConfig) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(config.reward_model.model_dump_json())
    return settings


def _is_same(folder: Path, made_of: dict[str, Any], feedback: pa.Table | None) -> bool:
    if not (folder / FINGERPRINT_FILE).exists() or json.loads((folder / FINGERPRINT_FILE).read_text()) != made_of:
        return False
    kept = folder / PREFERENCES
    if feedback is None or not kept.exists():
        return feedback is None and not kept.exists()
    return bool(pq.read_table(kept).equals(feedback))


async def run_reward_model(session: Session) -> None:
    """Train `reward_model/` on the run's preferences and report how it does on pairs it has not seen."""
    run = session.run
    if (run.path / TRAINING / FINGERPRINT_FILE).exists():
        raise InputError("reward_model", f"its training was interrupted (antiphon reward-model {run.path} goes on)")
    await _train_members(session, preferences_path(session.config, run.path), more=None, by_prompt=False)


async def retrain(session: Session) -> None:
    """Train it again on the run's preferences and what people said since; the old version is kept beside it."""
    run = session.run
    preferences, feedback = preferences_path(session.config, run.path), run.path / TRAINING / PREFERENCES
    more = feedback if feedback.exists() else None
    if more is not None and not preferences.exists():
        preferences, more = feedback, None
    await _train_members(session, preferences, more=more, by_prompt=True)


async def _train_members(session: Session, preferences: Path, *, more: Path | None, by_prompt: bool) -> None:
    """Train one member after the other, those that are done already left out, and publish them together."""
    config, run = session.config, session.run
    session.view.stage("reward_model", 0)
    held_out = run.path / HELD_OUT
    fresh = held_out if held_out.exists() and pq.read_metadata(held_out).num_rows else None
    for member in range(config.reward_model.num_members):
        output = member_folder(run.path / TRAINING / "reward_model", member)
        if (output / "config.json").exists():
            continue
        if config.reward_model.num_members > 1:
            session.view.note(f"reward model: member {member}, seed {config.run.seed + member}")
        task = Supervised(
            "reward_model",
            _name(member),
            model=policy_path(config, run.path),
            data=[Source(preferences)],
            output=output,
            fresh=fresh,
            more=more,
            by_prompt=by_prompt,
            member=member,
        )
        await train(session, task)
    _say(session, publish(run))
    await _say_agreement(session)


async def _say_agreement(session: Session) -> None:
    """Report how far annotators agree who labelled the same pairs."""
    path = session.run.path / FEEDBACK
    if not path.exists():
        return
    from reward_service.feedback.store import FeedbackStore

    store = FeedbackStore(path)
    try:
        agreement = (await store.summary()).mean_agreement
    finally:
        store.close()
    if agreement is None:
        return
    session.run.update_summary({"reward_model.agreement": {"raw": agreement.raw, "kappa": agreement.kappa}})
    kappa = "" if agreement.kappa is None else f", Cohen's kappa {agreement.kappa:.2f}"
    session.view.note(f"annotators agree on {agreement.raw:.0%} of the pairs that two of them labelled{kappa}")


def _name(member: int) -> str:
    """What a member's metrics and checkpoints are kept under."""
    return f"reward_model/member-{member}" if member else "reward_model"


def _say(session: Session, entry: dict[str, Any]) -> None:
    sources = ", ".join(f"{num:,} {source}" for source, num in entry["num_pairs_by_source"].items() if num)
    session.view.note(f"reward model: {entry['accuracy']:.1%} of fresh labels predicted")
    unsure = f", uncertainty {entry['uncertainty']:.3f}" if "uncertainty" in entry else ""
    session.view.note(
        f"reward model: calibration error {entry['ece']:.3f}, log-likelihood -{entry['nll']:.3f} nats, "
        f"mean margin {entry['margin_mean']:.3f}{unsure}"
    )
    session.view.note(f"reward model: {entry['version']} of {entry['num_pairs']:,} pairs ({sources})")
