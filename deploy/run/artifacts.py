"""Find the artifacts of a run: its newest policy, models and data sets. Reads only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from cluster.errors import InputError
from cluster.files import digest_files
from cluster.hub.download import local_data, local_model
from cluster.model_folder import weight_files
from deploy.config.chat import has_chat_settings
from deploy.config.schema import RunConfig
from deploy.run.directory import RunDirectory
from deploy.run.layout import CONFIG, FEEDBACK
from deploy.run.stages import checkpoint_step
from reward_service.feedback.selection import FeedbackSettings

STAGE_OF_FOLDER = {"sft": "SFT", "dpo": "DPO", "policy": "PPO"}
"""Folder of a trained policy -> the name of its stage for people, in the order of the stages."""


class NewestPolicy(NamedTuple):
    """A policy's step and folder."""

    step: int
    folder: Path

    def version(self) -> str:
        """Return an identifier of the policy: its step and a digest of its weights."""
        return f"{self.step}@{digest_files(weight_files(self.folder))}"


def newest_policy(config: RunConfig, run: RunDirectory) -> NewestPolicy:
    """Return the newest policy: PPO's result, its newest checkpoint, or the initial policy (step 0).

    Raises InputError if there is none yet.
    """
    checkpoint = run.newest_checkpoint("ppo")
    if run.is_done("ppo", config):
        newest = NewestPolicy(config.learner.num_steps, run.path / "policy")
    elif checkpoint:
        newest = NewestPolicy(checkpoint_step(checkpoint), checkpoint / "policy")
    else:
        newest = NewestPolicy(0, policy_path(config, run.path))
    if not (newest.folder / "config.json").is_file():
        raise InputError(str(run.path), "has no policy yet (run antiphon train first)")
    return newest


def policy_at(config: RunConfig, run: RunDirectory, step: int) -> NewestPolicy:
    """Return the policy of a PPO step: of a checkpoint, of PPO's result, or the policy that PPO starts from (step 0).

    Raises InputError with the steps that there are.
    """
    kept = {checkpoint_step(path): path / "policy" for path in run.checkpoints("ppo")}
    if (policy_path(config, run.path) / "config.json").is_file():
        kept[0] = policy_path(config, run.path)
    if run.is_done("ppo", config):
        kept[config.learner.num_steps] = run.path / "policy"
    if step not in kept:
        raise InputError("--step", f"{run.path} has no policy of step {step}; there are {_listed(kept)}")
    return NewestPolicy(step, kept[step])


def best_policy(config: RunConfig, run: RunDirectory) -> NewestPolicy:
    """Return the checkpoint with the best evaluation during PPO. Raises InputError if there was none."""
    best = run.best_checkpoint("ppo")
    if best is None:
        raise InputError("--best", f"{run.path} has evaluated no checkpoint yet (evaluation.every_steps)")
    return policy_at(config, run, checkpoint_step(best))


def _listed(steps: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(steps))) or "none"


def origin_of(run: RunDirectory, policy: NewestPolicy) -> str:
    """Return where a policy comes from, for a person to read."""
    folder, own = policy.folder.absolute(), run.path.absolute()
    if not folder.is_relative_to(own):
        return "the initial model"
    name = folder.relative_to(own).parts[0]
    if name in ("policy", "checkpoints"):
        return f"PPO step {policy.step}"
    return STAGE_OF_FOLDER.get(name, "the initial model")


def is_model_folder(path: Path) -> bool:
    """Return whether the folder holds a model and no run."""
    return (path / "config.json").is_file() and not (path / CONFIG).exists()


def feedback_settings(config: RunConfig, run: RunDirectory) -> FeedbackSettings:
    """Return the settings for collecting feedback: pairs of the newest policy, or any pairs if there is none."""
    version = None
    if (run.path / FEEDBACK).exists():  # a digest reads all weights; skip it if there are no pairs
        with contextlib.suppress(InputError):
            version = newest_policy(config, run).version()
    return FeedbackSettings(seed=config.run.seed, policy_version=version)


def model_path(config: RunConfig, run_path: Path) -> Path:
    """Return the folder of the run's initial model; downloads a model of the Hub.

    A model that is built, or for which the run file has chat settings, lies in the run directory.
    """
    if config.model.path is None or has_chat_settings(config):
        return run_path / "model"
    return local_model(config.model.path)


def policy_path(config: RunConfig, run_path: Path) -> Path:
    """Return the initial policy of PPO, which is also its reference: that of DPO, of SFT, or the initial model."""
    dpo = run_path / "dpo"
    return dpo if dpo.exists() else dpo_reference_path(config, run_path)


def dpo_reference_path(config: RunConfig, run_path: Path) -> Path:
    """Return the initial policy of DPO, which is also its reference: the SFT model if there is one."""
    sft = run_path / "sft"
    return sft if sft.exists() else model_path(config, run_path)


class TrainedPolicies(NamedTuple):
    """The policies before and after the last stage that trained one; `before` and `stage` are unset without any."""

    before: Path | None
    after: Path
    stage: str


def trained_policies(config: RunConfig, run_path: Path) -> TrainedPolicies:
    """Return the newest finished policy of a run and the one that its training began with."""
    folders = [(run_path / name, stage) for name, stage in STAGE_OF_FOLDER.items()]
    chain = [(model_path(config, run_path), ""), *((f, s) for f, s in folders if (f / "config.json").is_file())]
    (before, _), (after, stage) = chain[-2:] if len(chain) > 1 else (chain[0], chain[0])
    return TrainedPolicies(before if stage else None, after, stage)


def data_folder(run_path: Path, task: str) -> Path:
    """Return the folder into which a task's builder writes its data sets."""
    return run_path / "data" / task


def data_path(config: RunConfig, run_path: Path, name: str, task: str = "") -> Path:
    """Return the data set `name` (sft, prompts, evaluation) of a task: the run file's, or the builder's."""
    explicit = getattr(config.by_task()[task], name)
    return local_data(explicit) if explicit else data_folder(run_path, task) / f"{name}.parquet"


def preferences_path(config: RunConfig, run_path: Path) -> Path:
    """Return the preferences on which DPO and the reward model are trained."""
    return local_data(config.data.preferences) if config.data.preferences else run_path / "preferences.parquet"
