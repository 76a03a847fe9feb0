"""Settings of tasks that are right one by one and don't fit together; each error names its key of the run file.

Knows nothing of what a task is about, and opens no file.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cluster.errors import InputError
from deploy.run_sections import AdversarialConfig, TaskConfig
from reward_service.config import NO_SCORER, REWARD_MODEL, RewardServiceConfig
from rollout_actors.config import EnvironmentConfig

if TYPE_CHECKING:
    from deploy.run_config import RunConfig

TASK_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def check_task_names(config: RunConfig) -> None:
    """Raise InputError for what is no name, and for settings of one task beside [tasks.NAME]."""
    if not config.tasks:
        return
    for name in config.tasks:
        if not TASK_NAME.fullmatch(name):
            raise InputError(f"tasks.{name}", "is no name: a letter, then letters, digits, '_' and '-'")
    data = config.data
    of_one = {
        "data.builder": data.builder is not None,
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
            raise InputError(key, f"is of a run's only task, and this run names its tasks: set it in {named}")


def check_tasks(config: RunConfig) -> None:
    """Raise InputError for a task that lacks what a stage needs, or whose settings don't fit the other sections."""
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
        raise InputError(key, f"is none, and there is no environment ({where})")
    if task.scorer == REWARD_MODEL and task.environment.path is not None and "reward_model" not in stages:
        what = 'the run trains no reward model: "none" where the environment gives all the rewards'
        raise InputError(key, what)


def _check_environment(config: RunConfig, name: str, task: TaskConfig) -> None:
    actors, environment = config.rollout_actors, task.environment
    if environment.path is not None and actors.max_prompt_tokens >= environment.max_tokens:
        what = f"{environment.max_tokens} leave no room behind rollout_actors.max_prompt_tokens"
        raise InputError(config.key_of(name, "environment.max_tokens"), f"{what} = {actors.max_prompt_tokens}")


def _check_altered(config: RunConfig, name: str, task: TaskConfig) -> None:
    ways = config.key_of(name, "adversarial.ways")
    if task.environment.path is not None and task.adversarial.ways:
        raise InputError(ways, "conversations begin as the environment says: there is no prompt to alter")
    if task.adversarial_share and not task.adversarial.ways:
        key = config.key_of(name, "adversarial_share")
        raise InputError(key, f"name the ways in which prompts are altered ({ways})")


def _check_demonstrations(config: RunConfig) -> None:
    """A task may do without; all of them can't."""
    name = next(iter(config.by_task()))
    if "sft" in config.run.stages and not any(task.sft or task.builder for task in config.by_task().values()):
        raise InputError(config.key_of(name, "sft"), "stage sft needs it (or a builder)")


def _check_preferences(config: RunConfig) -> None:
    if "preferences" not in config.run.stages or config.data.preferences is not None:
        return
    if config.tasks:
        raise InputError("run.stages", "preferences are sampled from the prompts of one task: name data.preferences")
    task = config.by_task()[""]
    if task.environment.path is not None:
        raise InputError("run.stages", "preferences are sampled from prompts answered once: name data.preferences")
    if task.prompts is None and task.builder is None:
        raise InputError("data.prompts", "stage preferences needs it (or a builder)")
