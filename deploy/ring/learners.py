"""Start the learner group of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cluster.errors import InputError
from deploy.run.artifacts import policy_path
from deploy.run.model_size import with_learning_rate
from deploy.runtime.session import Session, dtype_of
from learner.estimators import needs_of
from learner.place import Place
from learner.ppo.group import PPOLearnerGroup
from learner.ppo.rank import LearnerSettings
from learner.ppo.schedule import Lengths, Phase


async def start_learners(
    session: Session, checkpoint: Path | None, first_step: int, *, lengths: Lengths, phases: Sequence[Phase] = ()
) -> PPOLearnerGroup:
    """Start the learner group at version `first_step` - 1: the checkpoint's, or the policy that PPO starts from.

    `lengths` are pairs (version, number of steps): the run's planned length from each version on. `phases` are its
    settings from each version on, if they changed.
    """
    policy = policy_path(session.config, session.run.path)
    config = with_learning_rate(session.config, policy)
    if config.rollout_actors.responses_per_prompt == 1 and needs_of(config.learner.advantages).groups:
        problem = "it compares the responses to a prompt; rollout_actors.responses_per_prompt is 1"
        raise InputError("learner.advantages", problem)
    place = Place(
        policy,
        dtype_of(config, policy),
        config.run.seed,
        log_dir=session.run.path / "logs",
        critic_path=session.run.path / "reward_model",
        checkpoint_path=checkpoint,
    )
    settings = LearnerSettings(
        config.learner,
        place,
        config.rollout_actors.temperature,
        tasks=tuple(config.tasks),
        lengths=tuple(lengths),
        phases=tuple(phases),
        version=first_step - 1,
    )
    return await PPOLearnerGroup.start(settings)
