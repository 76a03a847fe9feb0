"""Which policy of a run is the newest, and which pairs its annotators are asked about. Changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import InputError
from deploy.config.schema import RunConfig
from deploy.run.stages import checkpoint_step

if TYPE_CHECKING:
    pass

import contextlib
from typing import NamedTuple

from cluster.files import digest_files
from deploy.run.directory import RunDirectory
from deploy.run.layout import FEEDBACK
from reward_service.feedback.selection import FeedbackSettings


class NewestPolicy(NamedTuple):
    """A policy's step and folder."""

    step: int
    folder: Path

    def version(self) -> str:
        """Tells the policy from every other one: its step and a digest of its weights."""
        return f"{self.step}@{digest_files(sorted(self.folder.glob('*.safetensors')))}"


def newest_policy(config: RunConfig, run: RunDirectory) -> NewestPolicy:
    """The last policy: PPO's result, its newest checkpoint, or what it starts from (step 0).

    Raises InputError where there is none yet.
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
    """What a service beside the run asks people about: pairs of its newest policy, or any while there is none."""
    version = None
    if (run.path / FEEDBACK).exists():  # a policy's digest is not taken where there is nothing to ask
        with contextlib.suppress(InputError):
            version = newest_policy(config, run).version()
    return FeedbackSettings(seed=config.run.seed, policy_version=version)


def model_path(config: RunConfig, run_path: Path) -> Path:
    """The model a run starts from."""
    return Path(config.model.path) if config.model.path else run_path / "model"


def policy_path(config: RunConfig, run_path: Path) -> Path:
    """The policy that PPO starts from and stays near: the SFT model if there is one."""
    sft = run_path / "sft"
    return sft if sft.exists() else model_path(config, run_path)


def data_folder(run_path: Path, task: str) -> Path:
    """Where a task's builder leaves its data sets."""
    return run_path / "data" / task


def data_path(config: RunConfig, run_path: Path, name: str, task: str = "") -> Path:
    """The data set `name` (sft, prompts, evaluation) of a task: set in the run file, or made by the builder."""
    explicit = getattr(config.by_task()[task], name)
    return Path(explicit) if explicit else data_folder(run_path, task) / f"{name}.parquet"


def preferences_path(config: RunConfig, run_path: Path) -> Path:
    """The preferences the reward model is trained on."""
    return Path(config.data.preferences) if config.data.preferences else run_path / "preferences.parquet"
