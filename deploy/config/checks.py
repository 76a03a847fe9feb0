"""Check that settings of the run file fit together; each error names its key. Opens no file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from cluster.errors import InputError
from deploy.config.functions import dotted_paths
from deploy.config.schema import (
    STAGES,
    AdversarialConfig,
    TaskConfig,
)
from learner.config import LearnerConfig
from learner.estimators import ESTIMATORS
from reward_service.config.parts import may_have_part, part_names
from reward_service.config.service import NO_SCORER, REWARD_MODEL, RewardServiceConfig
from reward_service.http.address import require_token
from rollout_actors.config import EnvironmentConfig, RolloutActorsConfig, max_sequence_tokens

if TYPE_CHECKING:
    from deploy.config.schema import RunConfig

TASK_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def check_task_names(config: RunConfig) -> None:
    """Raise InputError for an invalid task name, and for settings of a single task beside [tasks.NAME]."""
    if not config.tasks:
        return
    for name in config.tasks:
        if not TASK_NAME.fullmatch(name):
            raise InputError(f"tasks.{name}", "is not a valid name: use a letter, then letters, digits, '_' and '-'")
    data = config.data
    of_one = {
        "data.builder": data.builder is not None,
        "data.settings": bool(data.settings),
        "data.shuffle": not data.shuffle,
        "data.sft": data.sft is not None,
        "data.prompts": data.prompts is not None,
        "data.evaluation": data.evaluation is not None,
        "data.adversarial_share": data.adversarial_share != 0,
        "adversarial": config.adversarial != AdversarialConfig(),
        "environment": config.environment != EnvironmentConfig(),
        "reward_service.scorer": config.reward_service.scorer != RewardServiceConfig().scorer,
        "evaluation.metrics": config.evaluation.metrics is not None,
    }
    for key, is_set in of_one.items():
        if is_set:
            named = ", ".join(f"[tasks.{name}]" for name in config.tasks)
            raise InputError(key, f"applies only to a run without [tasks.NAME]: set it in {named}")


def check_tasks(config: RunConfig) -> None:
    """Raise InputError if a task lacks what a stage needs, or does not fit the other sections."""
    for name, task in config.by_task().items():
        _check_data(config, name, task)
        _check_scorer(config, name, task)
        _check_environment(config, name, task)
        _check_altered(config, name, task)
    _check_demonstrations(config)
    _check_preferences(config)


def _check_data(config: RunConfig, name: str, task: TaskConfig) -> None:
    given = {
        "ppo": task.builder or task.prompts or task.environment.path,
        "evaluation": task.builder or task.evaluation or task.prompts or task.environment.path,
    }
    for stage in config.run.stages:
        if stage in given and given[stage] is None:
            raise InputError(config.key_of(name, "prompts"), f"stage {stage} needs it (or a builder)")


def _check_scorer(config: RunConfig, name: str, task: TaskConfig) -> None:
    key, stages = config.key_of(name, "scorer"), config.run.stages
    if task.scorer == NO_SCORER and task.environment.path is None:
        where = config.key_of(name, "environment.path")
        raise InputError(key, f"is none, but no environment is set ({where})")
    if task.scorer == REWARD_MODEL and task.environment.path is not None and "reward_model" not in stages:
        what = 'the run trains no reward model: set "none" if the environment gives all rewards'
        raise InputError(key, what)


def _check_environment(config: RunConfig, name: str, task: TaskConfig) -> None:
    actors, environment = config.rollout_actors, task.environment
    if environment.path is not None and actors.max_prompt_tokens >= environment.max_tokens:
        what = f"{environment.max_tokens} leave no room after rollout_actors.max_prompt_tokens"
        raise InputError(config.key_of(name, "environment.max_tokens"), f"{what} = {actors.max_prompt_tokens}")


def _check_altered(config: RunConfig, name: str, task: TaskConfig) -> None:
    ways = config.key_of(name, "adversarial.ways")
    if task.environment.path is not None and task.adversarial.ways:
        raise InputError(ways, "the environment writes the prompts, so none can be altered")
    if task.adversarial_share and not task.adversarial.ways:
        key = config.key_of(name, "adversarial_share")
        raise InputError(key, f"name the ways to alter prompts ({ways})")


def _check_demonstrations(config: RunConfig) -> None:
    """Require demonstrations of at least one task."""
    name = next(iter(config.by_task()))
    if "sft" in config.run.stages and not any(task.sft or task.builder for task in config.by_task().values()):
        raise InputError(config.key_of(name, "sft"), "stage sft needs it (or a builder)")


def _check_preferences(config: RunConfig) -> None:
    if "preferences" not in config.run.stages or config.data.preferences is not None:
        return
    if config.tasks:
        raise InputError("run.stages", "preferences are sampled for a single task only: set data.preferences")
    task = config.by_task()[""]
    if task.environment.path is not None:
        raise InputError("run.stages", "preferences are not sampled with an environment: set data.preferences")
    if task.prompts is None and task.builder is None:
        raise InputError("data.prompts", "stage preferences needs it (or a builder)")


DOTTED_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def check_fit(config: RunConfig) -> None:
    """Raise InputError naming the key if valid settings do not fit together."""
    check_task_names(config)
    _check_model(config)
    check_tasks(config)
    _check_actors(config.rollout_actors)
    _check_sampling(config)
    _check_batch(config)
    _check_learner(config.learner)
    _check_critic(config)
    _check_constraint(config)
    _check_context(config)
    _check_stages(config)
    patience_s, take_s = config.reward_service.patience_s, config.trajectory_queue.take_timeout_s
    if patience_s >= take_s:
        what = f"{patience_s:g} s must be less than trajectory_queue.take_timeout_s = {take_s:g} s"
        raise InputError("reward_service.patience_s", what)
    for key, path in dotted_paths(config).items():
        if not DOTTED_PATH.fullmatch(path):
            other = " and no name in reward_service.scorers" if key.endswith(".scorer") else ""
            raise InputError(key, f"{path!r} is not a dotted path such as package.module:function{other}")
    if config.reward_service.port is not None:
        require_token(config.reward_service, os.environ.get("ANTIPHON_TOKEN"))


def _check_model(config: RunConfig) -> None:
    if config.model.path is None and config.model.builder is None:
        raise InputError("model", "give a path or a builder")


def _check_actors(settings: RolloutActorsConfig) -> None:
    if settings.max_actors is not None and settings.max_actors < settings.num_actors:
        what = f"{settings.max_actors} is less than rollout_actors.num_actors = {settings.num_actors}"
        raise InputError("rollout_actors.max_actors", what)


def _check_sampling(config: RunConfig) -> None:
    """Raise InputError if PPO would train on samples of a part of the distribution."""
    actors, plain = config.rollout_actors, RolloutActorsConfig()
    for name in ("top_p", "top_k", "min_p"):
        if "ppo" in config.run.stages and getattr(actors, name) != getattr(plain, name):
            what = "PPO trains on samples of the whole distribution: the learner cannot know which tokens were kept"
            raise InputError(f"rollout_actors.{name}", f"{what}. Leave it out of a run with the stage ppo")


def _check_batch(config: RunConfig) -> None:
    groups, size = config.trajectory_queue.groups_per_step, config.rollout_actors.responses_per_prompt
    parts, ranks = config.learner.num_minibatches, max(1, config.learner.num_learners)
    batch = f"the {groups * size} responses of a step ({groups} groups_per_step x {size} responses_per_prompt)"
    needs = ESTIMATORS.get(config.learner.advantages)
    if size == 1 and needs is not None and needs.groups:
        what = (
            f"{config.learner.advantages} compares the responses to a prompt; rollout_actors.responses_per_prompt is 1"
        )
        raise InputError("learner.advantages", what)
    if size == 1 and config.learner.zero_variance_groups != "train":
        what = "a group of a single response has no variance (rollout_actors.responses_per_prompt is 1)"
        raise InputError("learner.zero_variance_groups", what)
    if ranks > groups:
        raise InputError("learner.num_learners", f"{ranks} learners share {groups} trajectory_queue.groups_per_step")
    if groups * size % parts:
        raise InputError("learner.num_minibatches", f"{parts} does not divide {batch}")
    if groups * size % (parts * ranks):
        raise InputError("learner.num_learners", f"{ranks} x {parts} num_minibatches does not divide {batch}")


class _Rule(NamedTuple):
    """A combination of the learner's settings that is refused; `key` is without `learner.`."""

    key: str
    is_wrong: Callable[[LearnerConfig], bool]
    message: str


_LEARNER_RULES = (
    _Rule(
        "kl_estimator",
        lambda learner: (learner.kl_in, learner.kl_estimator) == ("loss", "k1"),
        'k1 has a gradient of mean 0 in the loss: set k2 or k3, or kl_in = "reward"',
    ),
    _Rule(
        "dual_clip",
        lambda learner: learner.dual_clip is not None and learner.policy_objective == "cispo",
        "cispo clips the importance weight, not the loss: remove this setting",
    ),
    _Rule(
        "importance_floor",
        lambda learner: learner.importance_floor > 0 and learner.importance_outside != "mask",
        'has an effect only with importance_outside = "mask"',
    ),
    _Rule(
        "importance_cap",
        lambda learner: learner.importance_cap <= learner.importance_floor,
        "must be above importance_floor",
    ),
    _Rule(
        "importance_level",
        lambda learner: not learner.decoupled and learner.importance_level == "sequence",
        "without decoupled PPO there are no importance weights",
    ),
    _Rule(
        "importance_outside",
        lambda learner: not learner.decoupled and learner.importance_outside == "mask",
        "without decoupled PPO there are no importance weights",
    ),
    _Rule(
        "zero_variance_groups",
        lambda learner: learner.zero_variance_groups != "train" and learner.constraint.cost is not None,
        'responses with equal rewards may differ in their cost: set "train" with learner.constraint',
    ),
    _Rule(
        "data_parallel",
        lambda learner: learner.data_parallel == "fsdp2" and learner.num_learners == 0,
        "fsdp2 needs separate learner processes: set num_learners to 1 or more",
    ),
    _Rule(
        "lora.target_modules",
        lambda learner: any(name in ("lm_head", "embed_tokens") for name in learner.lora.target_modules),
        "an adapter on lm_head or embed_tokens can't be merged if the two are tied: remove it",
    ),
)


def _check_learner(learner: LearnerConfig) -> None:
    """Raise InputError for settings of the learner that contradict each other."""
    for rule in _LEARNER_RULES:
        if rule.is_wrong(learner):
            raise InputError(f"learner.{rule.key}", rule.message)


def _check_critic(config: RunConfig) -> None:
    learner, needs = config.learner, ESTIMATORS.get(config.learner.advantages)
    if needs is not None and not needs.critic:
        for key, is_set in (
            ("critic_warmup_steps", learner.critic_warmup_steps > 0),
            ("gae_lambda_alpha", learner.gae_lambda_alpha is not None),
            ("gae_value_lambda", learner.gae_value_lambda is not None),
            ("critic_from", learner.critic_from != "policy"),
        ):
            if is_set:
                raise InputError(f"learner.{key}", f"{learner.advantages} has no critic")
    if learner.critic_from == "reward_model":
        if learner.critic != "separate":
            raise InputError(
                "learner.critic_from", 'only a separate critic can start from a model: set critic = "separate"'
            )
        if "ppo" in config.run.stages and "reward_model" not in config.run.stages:
            raise InputError("learner.critic_from", "the run trains no reward model (run.stages)")


def _check_constraint(config: RunConfig) -> None:
    """Raise InputError if a task's reward lacks the cost; an environment may return a part of any name."""
    cost = config.learner.constraint.cost
    for task in config.by_task().values() if cost is not None else ():
        service = config.reward_service.model_copy(update={"scorer": task.scorer})
        if task.environment.path is None and not may_have_part(service, str(cost)):
            what = f"no reward of {task.scorer} has a part {cost!r}; its parts are {', '.join(part_names(service))}"
            raise InputError("learner.constraint.cost", what)


def _check_context(config: RunConfig) -> None:
    limit = config.rollout_actors.engine.get("max_model_len")
    if isinstance(limit, int):
        check_context_length(config, limit, "rollout_actors.engine.max_model_len")


def check_context_length(config: RunConfig, limit: int, limit_name: str) -> None:
    """Raise InputError if the longest prompt and response together exceed `limit` tokens."""
    actors = config.rollout_actors
    for name, task in config.by_task().items():
        longest = max_sequence_tokens(actors, [task.environment])
        if longest > limit and task.environment.path is not None:
            key = config.key_of(name, "environment.max_tokens")
            raise InputError(key, f"{longest} tokens, but {limit_name} is {limit}")
        if longest > limit:
            what = f"{actors.max_prompt_tokens} max_prompt_tokens + {actors.max_response_tokens} = {longest} tokens"
            raise InputError("rollout_actors.max_response_tokens", f"{what}, but {limit_name} is {limit}")


def _check_stages(config: RunConfig) -> None:
    stages = config.run.stages
    if not stages:
        raise InputError("run.stages", f"name at least one of {', '.join(STAGES)}")
    labelled = config.data.preferences is not None
    if "preferences" in stages and config.preferences.annotator is None and not labelled:
        raise InputError("preferences.annotator", "stage preferences needs it (or data.preferences)")
