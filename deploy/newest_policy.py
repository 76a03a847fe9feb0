"""Which policy of a run is the newest, and which pairs its annotators are asked about. Changes nothing."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

from cluster.errors import InputError
from deploy.config.schema import RunConfig
from deploy.run_directory import FEEDBACK, RunDirectory, checkpoint_step
from deploy.stages import policy_path
from reward_service.pair_choice import FeedbackSettings
from reward_service.scorer import digest_files


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
