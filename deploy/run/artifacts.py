"""Find the artifacts of a run: its newest policy, models and data sets. Reads only."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

from cluster.errors import InputError
from cluster.files import digest_files
from cluster.hub.download import local_data, local_model
from cluster.model_folder import weight_files
from deploy.config.chat import has_chat_settings
from deploy.config.schema import RunConfig
from deploy.run.directory import RunDirectory
from deploy.run.layout import FEEDBACK
from deploy.run.stages import checkpoint_step
from reward_service.feedback.selection import FeedbackSettings


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
    """Return the initial policy of PPO, which is also its reference: the SFT model if there is one."""
    sft = run_path / "sft"
    return sft if sft.exists() else model_path(config, run_path)


def data_folder(run_path: Path, task: str) -> Path:
    """Return the folder into which a task's builder writes its data sets."""
    return run_path / "data" / task


def data_path(config: RunConfig, run_path: Path, name: str, task: str = "") -> Path:
    """Return the data set `name` (sft, prompts, evaluation) of a task: the run file's, or the builder's."""
    explicit = getattr(config.by_task()[task], name)
    return local_data(explicit) if explicit else data_folder(run_path, task) / f"{name}.parquet"


def preferences_path(config: RunConfig, run_path: Path) -> Path:
    """Return the preferences on which the reward model is trained."""
    return local_data(config.data.preferences) if config.data.preferences else run_path / "preferences.parquet"
