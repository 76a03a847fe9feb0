"""The run file: TOML in, one frozen `RunConfig` out; settings that don't fit together fail here, not an hour later.

Knows nothing of what the settings do, opens no file but the run file, and imports neither torch nor ray. What can
only be told from other files (the model, the data sets) is `deploy.check`'s affair.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from cluster.config import Section, TrajectoryQueueConfig
from cluster.errors import InputError
from deploy.run_sections import (
    STAGES,
    AdversarialConfig,
    DataSection,
    EvaluationConfig,
    ModelSection,
    RunSection,
    TaskConfig,
)
from deploy.setting_errors import input_error
from deploy.task_checks import check_task_names, check_tasks
from learner.config import GROUP_ADVANTAGES, LearnerConfig, PreferencesConfig, RewardModelConfig, SftConfig
from reward_service.address import require_token
from reward_service.composite_config import reached
from reward_service.config import NO_SCORER, REWARD_MODEL, RewardServiceConfig
from reward_service.part_names import may_have_part, part_names
from reward_service.scorer_config import ForbiddenConfig, FunctionConfig
from rollout_actors.config import EnvironmentConfig, RolloutActorsConfig, max_sequence_tokens

DOTTED_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
KEYS_OF_ONE_TASK = {
    "builder": "data.builder",
    "sft": "data.sft",
    "prompts": "data.prompts",
    "evaluation": "data.evaluation",
    "scorer": "reward_service.scorer",
    "environment.path": "environment.path",
    "environment.max_tokens": "environment.max_tokens",
    "adversarial.ways": "adversarial.ways",
    "adversarial.paraphrase": "adversarial.paraphrase",
    "adversarial_share": "data.adversarial_share",
    "metrics": "evaluation.metrics",
}
"""Where a run that names no tasks says what [tasks.NAME] says of one."""
T = TypeVar("T", bound=Section)


class RunConfig(Section):
    """A whole run file; a section that is left out has its defaults."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    adversarial: AdversarialConfig = AdversarialConfig()
    tasks: dict[str, TaskConfig] = Field(default_factory=dict)
    """Several tasks at once, each by its name, in the place of the one that [data], [adversarial], [environment] and
    the scorer and metrics beside them describe."""
    rollout_actors: RolloutActorsConfig = RolloutActorsConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    trajectory_queue: TrajectoryQueueConfig = TrajectoryQueueConfig()
    reward_service: RewardServiceConfig = RewardServiceConfig()
    learner: LearnerConfig = LearnerConfig()
    sft: SftConfig = SftConfig()
    preferences: PreferencesConfig = PreferencesConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def by_task(self) -> dict[str, TaskConfig]:
        """The tasks by their names. The one of a run that names none has no name: ''."""
        data = self.data
        return self.tasks or {
            "": TaskConfig(
                builder=data.builder,
                sft=data.sft,
                prompts=data.prompts,
                evaluation=data.evaluation,
                scorer=self.reward_service.scorer,
                environment=self.environment,
                adversarial=self.adversarial,
                adversarial_share=data.adversarial_share,
                metrics=self.evaluation.metrics,
            )
        }

    def recorded_as(self, task: str) -> str:
        """What a task's trajectories are recorded under: its name, or the run's where it has none."""
        return task or self.run.name

    def key_of(self, task: str, field: str) -> str:
        """The key of the run file that holds a task's field."""
        return f"tasks.{task}.{field}" if task else KEYS_OF_ONE_TASK[field]

    def served(self) -> RewardServiceConfig:
        """The settings of the reward service that all tasks together need."""
        return self.reward_service.serving([task.scorer for task in self.by_task().values()])


def load_run_config(
    path: Path, overrides: Sequence[str] = (), *, beside: bool = True, option: str = "--set"
) -> RunConfig:
    """Read a run file, then each override: one more line of TOML, such as ``learner.learning_rate = 5e-7``.

    `option` is what an override was given with.

    A relative path to a model or a data set is looked for beside the run file first, then in the working directory
    (with `beside=False`, as for the resolved file in a run directory, only there). It is kept relative to the working
    directory where it lies beneath it, so that a run goes on in another copy of the repository.
    Raises InputError naming the key.
    """
    settings = _read(path)
    for line in overrides:
        settings = _merged(settings, _parse_line(line, option))
    config = _validated(settings)
    config = _with_paths(config, path.parent if beside else Path())
    if not config.run.name:
        config = _replaced(config, "run", name=path.resolve().parent.name)
    check_fit(config)
    return config


def read_run_config(path: Path) -> RunConfig:
    """Read a resolved run file as it stands, without asking whether its settings fit together."""
    return _validated(_read(path))


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(str(path), f"cannot read the run file ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(str(path), f"not TOML: {error}") from error


def _parse_line(line: str, option: str) -> dict[str, Any]:
    try:
        return tomllib.loads(line)
    except tomllib.TOMLDecodeError as error:
        hint = "; text needs quotes" if "value" in str(error).lower() else ""
        raise InputError(option, f"{line!r} is not a line of TOML ({error}{hint})") from error


def _merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in more.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            result[key] = _merged(old, value)
        else:
            result[key] = value
    return result


def _validated(settings: Mapping[str, Any]) -> RunConfig:
    try:
        return RunConfig.model_validate_json(json.dumps(settings, default=str), strict=True)
    except ValidationError as error:
        raise input_error(error, RunConfig) from error


def _with_paths(config: RunConfig, folder: Path) -> RunConfig:
    config = config.model_copy(update={"model": _found(config.model, folder), "data": _found(config.data, folder)})
    tasks = {name: _found(task, folder) for name, task in config.tasks.items()}
    config = config.model_copy(update={"tasks": tasks})
    scorers = {}
    for name, scorer in config.reward_service.scorers.items():
        path = getattr(scorer, "path", None)
        found = {"path": _resolved(path, folder)} if isinstance(path, Path) else {}
        scorers[name] = scorer.model_copy(update=found)
    return _replaced(config, "reward_service", scorers=scorers)


def _found(section: T, folder: Path) -> T:
    """A section with its paths where the files are."""
    paths = {key: _resolved(value, folder) for key, value in section if isinstance(value, Path)}
    return section.model_copy(update=paths)


def _resolved(path: Path, folder: Path) -> Path:
    path = path.expanduser()
    found = folder / path if (folder / path).exists() else path
    absolute, working_directory = Path(os.path.abspath(found)), Path.cwd()
    return absolute.relative_to(working_directory) if absolute.is_relative_to(working_directory) else absolute


def _replaced(config: RunConfig, section: str, **values: Any) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def check_fit(config: RunConfig) -> None:
    """Raise InputError naming the key for settings that are right one by one and don't fit together."""
    check_task_names(config)
    _check_model(config)
    check_tasks(config)
    _check_actors(config.rollout_actors)
    _check_batch(config)
    _check_learner(config.learner)
    _check_critic(config)
    _check_constraint(config)
    _check_context(config)
    _check_stages(config)
    patience_s, take_s = config.reward_service.patience_s, config.trajectory_queue.take_timeout_s
    if patience_s >= take_s:
        what = f"{patience_s:g} s is not less than trajectory_queue.take_timeout_s = {take_s:g} s, which comes first"
        raise InputError("reward_service.patience_s", what)
    for key, path in dotted_paths(config).items():
        if not DOTTED_PATH.fullmatch(path):
            other = " and no name in reward_service.scorers" if key.endswith(".scorer") else ""
            raise InputError(key, f"{path!r} is not a dotted path such as package.module:function{other}")
    if config.reward_service.port is not None:
        require_token(config.reward_service, os.environ.get("ANTIPHON_TOKEN"))


def dotted_paths(config: RunConfig) -> dict[str, str]:
    """Every function that the run file names, by its key."""
    named = {
        "model.builder": config.model.builder,
        **_task_paths(config),
        **_named_scorer_paths(config.reward_service, config.reward_service.scorers),
        "preferences.annotator": config.preferences.annotator,
        "preferences.oracle": config.preferences.oracle,
    }
    return {key: path for key, path in named.items() if path is not None}


def _task_paths(config: RunConfig) -> dict[str, str | None]:
    paths: dict[str, str | None] = {}
    for name, task in config.by_task().items():
        own = {
            "builder": task.builder,
            "adversarial.paraphrase": task.adversarial.paraphrase,
            "environment.path": task.environment.path,
            "scorer": None if _is_named(task.scorer, config.reward_service) else task.scorer,
            "metrics": task.metrics,
        }
        paths |= {config.key_of(name, field): path for field, path in own.items()}
    return paths


def _is_named(scorer: str, service: RewardServiceConfig) -> bool:
    return scorer in (REWARD_MODEL, NO_SCORER, *service.scorers)


def scorer_paths(config: RunConfig, task: str) -> dict[str, str]:
    """Every function that scores a task, by the key that names it; of a run's only task, all that there are."""
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


def _check_model(config: RunConfig) -> None:
    if config.model.path is None and config.model.builder is None:
        raise InputError("model", "give a path or a builder")
    if config.model.path is not None and config.model.builder is not None:
        raise InputError("model", "give a path or a builder, not both")


def _check_actors(settings: RolloutActorsConfig) -> None:
    if settings.max_actors is not None and settings.max_actors < settings.num_actors:
        what = f"{settings.max_actors} is less than rollout_actors.num_actors = {settings.num_actors}"
        raise InputError("rollout_actors.max_actors", what)


def _check_batch(config: RunConfig) -> None:
    groups, size = config.trajectory_queue.groups_per_step, config.rollout_actors.responses_per_prompt
    parts, ranks = config.learner.num_minibatches, max(1, config.learner.num_learners)
    batch = f"the {groups * size} responses of a step ({groups} groups_per_step x {size} responses_per_prompt)"
    if size == 1 and config.learner.advantages in GROUP_ADVANTAGES:
        what = (
            f"{config.learner.advantages} compares the responses to a prompt; rollout_actors.responses_per_prompt is 1"
        )
        raise InputError("learner.advantages", what)
    if ranks > groups:
        raise InputError("learner.num_learners", f"{ranks} learners share {groups} trajectory_queue.groups_per_step")
    if groups * size % parts:
        raise InputError("learner.num_minibatches", f"{parts} does not divide {batch}")
    if groups * size % (parts * ranks):
        raise InputError("learner.num_learners", f"{ranks} x {parts} num_minibatches does not divide {batch}")


def _check_learner(learner: LearnerConfig) -> None:
    """Settings of the learner that make no sense together."""
    refused = {
        "kl_estimator": (
            (learner.kl_in, learner.kl_estimator) == ("loss", "k1"),
            'k1 in the loss pulls nowhere (its gradient has mean 0): take k2 or k3, or kl_in = "reward"',
        ),
        "dual_clip": (
            learner.dual_clip is not None and learner.policy_objective == "cispo",
            "cispo clips no loss, only its weight: leave it out",
        ),
        "importance_floor": (
            learner.importance_floor > 0 and learner.importance_outside != "mask",
            'is the lower end of a band: it needs importance_outside = "mask"',
        ),
        "importance_cap": (learner.importance_cap <= learner.importance_floor, "is not above importance_floor"),
        "importance_level": (
            not learner.decoupled and learner.importance_level == "sequence",
            "without decoupled PPO there are no importance weights",
        ),
        "importance_outside": (
            not learner.decoupled and learner.importance_outside == "mask",
            "without decoupled PPO there are no importance weights",
        ),
        "data_parallel": (
            learner.data_parallel == "fsdp2" and learner.num_learners == 0,
            "fsdp2 needs learners of their own: num_learners of 1 or more",
        ),
        "lora.target_modules": (
            any(name in ("lm_head", "embed_tokens") for name in learner.lora.target_modules),
            "an adapter on the head or the embedding can't be merged where they are one matrix: leave it out",
        ),
    }
    for key, (is_wrong, what) in refused.items():
        if is_wrong:
            raise InputError(f"learner.{key}", what)


def _check_critic(config: RunConfig) -> None:
    learner = config.learner
    if learner.advantages != "gae":
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
            raise InputError("learner.critic_from", 'only a separate critic can start as a model: critic = "separate"')
        if "ppo" in config.run.stages and "reward_model" not in config.run.stages:
            raise InputError("learner.critic_from", "the run trains no reward model (run.stages)")


def _check_constraint(config: RunConfig) -> None:
    """Raise InputError for a cost that some task's reward has not; an environment may give a part of any name."""
    cost = config.learner.constraint.cost
    for task in config.by_task().values() if cost is not None else ():
        service = config.reward_service.model_copy(update={"scorer": task.scorer})
        if task.environment.path is None and not may_have_part(service, str(cost)):
            what = f"no reward of {task.scorer} has a part {cost!r}: there are {', '.join(part_names(service))}"
            raise InputError("learner.constraint.cost", what)


def _check_context(config: RunConfig) -> None:
    limit = config.rollout_actors.engine.get("max_model_len")
    if isinstance(limit, int):
        check_context_length(config, limit, "rollout_actors.engine.max_model_len")


def check_context_length(config: RunConfig, limit: int, limit_name: str) -> None:
    """Raise InputError when the longest prompt with the longest response is longer than `limit` tokens."""
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
