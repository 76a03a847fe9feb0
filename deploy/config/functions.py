"""Find the dotted paths that a run file names."""

from __future__ import annotations

from collections.abc import Collection

from deploy.config.schema import (
    RunConfig,
)
from learner.estimators import ESTIMATORS
from reward_service.config.composite import reached
from reward_service.config.scorers import ForbiddenConfig, FunctionConfig
from reward_service.config.service import NO_SCORER, REWARD_MODEL, RewardServiceConfig
from rollout_actors.config import ADAPTERS


def dotted_paths(config: RunConfig) -> dict[str, str]:
    """Return the dotted paths that the run file names, by key."""
    named = {
        "model.builder": config.model.builder,
        **_task_paths(config),
        **_named_scorer_paths(config.reward_service, config.reward_service.scorers),
        "preferences.annotator": config.preferences.annotator,
        "preferences.oracle": config.preferences.oracle,
        "learner.advantages": None if config.learner.advantages in ESTIMATORS else config.learner.advantages,
    }
    return {key: path for key, path in named.items() if path is not None}


def _task_paths(config: RunConfig) -> dict[str, str | None]:
    paths: dict[str, str | None] = {}
    for name, task in config.by_task().items():
        own = {
            "builder": task.builder,
            "adversarial.paraphrase": task.adversarial.paraphrase,
            "environment.path": None if task.environment.path in ADAPTERS else task.environment.path,
            "scorer": None if _is_named(task.scorer, config.reward_service) else task.scorer,
            "metrics": task.metrics,
        }
        paths |= {config.key_of(name, field): path for field, path in own.items()}
    return paths


def _is_named(scorer: str, service: RewardServiceConfig) -> bool:
    return scorer in (REWARD_MODEL, NO_SCORER, *service.scorers)


def scorer_paths(config: RunConfig, task: str) -> dict[str, str]:
    """Return the dotted paths of a task's scorers, by key; all of them if the run has a single task."""
    scorer, service = config.by_task()[task].scorer, config.reward_service
    own = {} if _is_named(scorer, service) else {config.key_of(task, "scorer"): scorer}
    return own | _named_scorer_paths(service, reached(scorer, service.scorers) if task else set(service.scorers))


def _named_scorer_paths(service: RewardServiceConfig, names: Collection[str]) -> dict[str, str]:
    paths = {}
    for name in (name for name in service.scorers if name in names):
        scorer = service.scorers[name]
        if isinstance(scorer, FunctionConfig):
            paths[f"reward_service.scorers.{name}.path"] = scorer.path
        elif isinstance(scorer, ForbiddenConfig) and scorer.function is not None:
            paths[f"reward_service.scorers.{name}.function"] = scorer.function
    return paths
