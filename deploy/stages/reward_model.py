"""The reward model's stage, and `antiphon reward-model RUN`, which trains it again on all preferences so far.

Those are the run's own pairs and the answers that people gave on the labelling page; only this module reads the
answers for training. Each version starts from the policy that PPO starts from. A pair whose prompt was held out before
is held out again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.data.control_tokens import RenderedPrompt
from cluster.data.datasets import Source
from cluster.data.rendered_prompts import literals_column
from cluster.errors import InputError
from deploy.config.schema import RunConfig
from deploy.data.forms import is_conversational
from deploy.run.artifacts import policy_path, preferences_path
from deploy.run.directory import RunDirectory
from deploy.run.layout import FEEDBACK, FINGERPRINT_FILE, HELD_OUT, PREFERENCES, SERVING, TRAINING
from deploy.run.open import open_run
from deploy.run.reward_models import member_folder, publish
from deploy.run.stages import require_stages
from deploy.runtime.session import Session
from deploy.runtime.status import running
from deploy.stages.launch import run_function
from deploy.stages.supervised import StartLearners, Supervised, start_learners, train
from deploy.terminal.view import View


def retrain(config: RunConfig, path: Path, view: View, *, launch: Callable[..., None] = run_function) -> list[int]:
    """Train a run's reward model again and publish it to the run's services; returns the services' ports.

    Settings of [reward_model] may differ from those before. Raises InputError if there are no preferences, or if other
    settings have changed.
    """
    have = ["preferences"] if (path / FEEDBACK).exists() else []
    require_stages(config, RunDirectory(path), ["reward_model"], have=have)
    with open_run(config, path, free=["reward_model"]) as run:
        begin(run, config)
        with running(run), view:
            launch(config, run, "reward_model", train_again, view)
    if not (path / SERVING).is_dir():
        return []
    from deploy.runtime.services import publish_to_services

    return publish_to_services(path)


def begin(run: RunDirectory, config: RunConfig) -> None:
    """Write the preferences and settings to train on; call it before the session starts.

    Resumes an interrupted training if its preferences and settings are unchanged; otherwise deletes it and the metrics
    of the version before.
    """
    folder, settings = run.path / TRAINING, json.loads(config.reward_model.model_dump_json())
    feedback = read_feedback(config, run.path)
    if _is_same(folder, settings, feedback):
        return
    _clear(run)
    folder.mkdir()
    if feedback is not None:
        pq.write_table(feedback, folder / PREFERENCES)
    (folder / FINGERPRINT_FILE).write_text(json.dumps(settings) + "\n")


def _clear(run: RunDirectory) -> None:
    """Delete the files of an interrupted training and the metrics of the last one."""
    shutil.rmtree(run.path / TRAINING, ignore_errors=True)
    shutil.rmtree(run.path / "checkpoints" / "reward_model", ignore_errors=True)
    for stage in {row["stage"] for row in run.metrics()}:
        if stage.partition("/")[0] == "reward_model":
            run.rewind_metrics(stage, 0)


def read_feedback(config: RunConfig, run_path: Path) -> pa.Table | None:
    """Return the answers of all annotators, one row each, or None if there are none.

    Annotators that disagree are the noise that label smoothing is for.
    """
    store = run_path / FEEDBACK
    if not store.exists():
        return None
    from reward_service.feedback.store import read_preferences

    table = read_preferences(store).select(["prompt", "chosen", "rejected"])
    if not table.num_rows:
        return None
    is_rendered = any(is_conversational(config, run_path, task) for task in config.by_task())
    return _as_rendered(table) if is_rendered else table


def _as_rendered(feedback: pa.Table) -> pa.Table:
    """Return the answers with their prompts marked as written by the chat template."""
    prompts = [RenderedPrompt(prompt) for prompt in feedback.column("prompt").to_pylist()]
    for name, column in literals_column(prompts).items():
        feedback = feedback.append_column(name, column)
    return feedback


def _is_same(folder: Path, settings: dict[str, Any], feedback: pa.Table | None) -> bool:
    if not (folder / FINGERPRINT_FILE).exists() or json.loads((folder / FINGERPRINT_FILE).read_text()) != settings:
        return False
    kept = folder / PREFERENCES
    if feedback is None or not kept.exists():
        return feedback is None and not kept.exists()
    return bool(pq.read_table(kept).equals(feedback))


async def train_reward_model(session: Session, *, start: StartLearners = start_learners) -> None:
    """Train `reward_model/` on the run's preferences and report its accuracy on unseen pairs."""
    run = session.run
    if (run.path / TRAINING / FINGERPRINT_FILE).exists():
        raise InputError("reward_model", f"its training was interrupted (antiphon reward-model {run.path} resumes it)")
    preferences = preferences_path(session.config, run.path)
    await _train_members(session, start, preferences, more=None, by_prompt=False)


async def train_again(session: Session, *, start: StartLearners = start_learners) -> None:
    """Train it again on the run's preferences and the answers since; the old version stays in `reward_models/`."""
    run = session.run
    preferences, feedback = preferences_path(session.config, run.path), run.path / TRAINING / PREFERENCES
    more = feedback if feedback.exists() else None
    if more is not None and not preferences.exists():
        preferences, more = feedback, None
    await _train_members(session, start, preferences, more=more, by_prompt=True)


async def _train_members(
    session: Session, start: StartLearners, preferences: Path, *, more: Path | None, by_prompt: bool
) -> None:
    """Train the members that are not done, one after the other, and publish all of them together."""
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
        await train(session, task, start=start)
    _note_version(session, publish(run))
    await _note_agreement(session)


async def _note_agreement(session: Session) -> None:
    """Report the agreement of annotators that labelled the same pairs."""
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
    """Return the name under which a member's metrics and checkpoints are kept."""
    return f"reward_model/member-{member}" if member else "reward_model"


def _note_version(session: Session, entry: dict[str, Any]) -> None:
    sources = ", ".join(f"{num:,} {source}" for source, num in entry["num_pairs_by_source"].items() if num)
    session.view.note(f"reward model: {entry['accuracy']:.1%} of fresh labels predicted")
    unsure = f", uncertainty {entry['uncertainty']:.3f}" if "uncertainty" in entry else ""
    session.view.note(
        f"reward model: calibration error {entry['ece']:.3f}, log-likelihood -{entry['nll']:.3f} nats, "
        f"mean margin {entry['margin_mean']:.3f}{unsure}"
    )
    session.view.note(f"reward model: {entry['version']} of {entry['num_pairs']:,} pairs ({sources})")
