"""From the settings of the run file to scorers. Imports torch only when a reward model is asked for."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.config import Section
from cluster.errors import InputError
from reward_service.config import scorers as kinds
from reward_service.config.composite import REWARD_MODEL, CompositeConfig, Statistics
from reward_service.config.service import NO_SCORER, RewardServiceConfig
from reward_service.sandbox import sandbox
from reward_service.sandbox.worker import Workers
from reward_service.scorers import checked_rules, code_rule, rules
from reward_service.scorers.composite import CompositeScorer, GuardedScorer
from reward_service.scorers.files import check_files, read_phrases, read_schema, read_statistics, require_reward_model
from reward_service.scorers.function import FunctionScorer
from reward_service.scorers.judge import JudgeScorer, api_key
from reward_service.scorers.rules import Rule, RuleScorer
from reward_service.scorers.scorer import Scorer, digest_of

WHERE = "reward_service.scorer"
HERE = Path(__file__).parent
PURE: dict[type[Section], Callable[[Any], Rule]] = {
    kinds.ExactConfig: rules.exact_rule,
    kinds.NumericConfig: rules.numeric_rule,
    kinds.RegexConfig: rules.regex_rule,
    kinds.LengthConfig: rules.length_rule,
    kinds.TruncationConfig: rules.truncation_rule,
    kinds.RepetitionConfig: rules.repetition_rule,
    kinds.LanguageConfig: rules.language_rule,
}
LIBRARIES = {
    "math": ("math-verify", "latex2sympy2_extended", "sympy"),
    "json_schema": ("jsonschema",),
    "language": ("py3langid",),
}
SOURCES = {
    "math": ("rules.py", "checked_rules.py", "../sandbox/worker_child.py"),
    "json_schema": ("rules.py", "checked_rules.py", "../sandbox/worker_child.py"),
    "code": ("rules.py", "checked_rules.py", "code_rule.py", "../sandbox/sandbox_child.py"),
}


def check_scorers(config: RewardServiceConfig, reward_model_path: Path | None) -> None:
    """Raise InputError for a scorer that can't exist: an untrained reward model, a function or file not found, a
    judge without its key."""
    if config.scorer == NO_SCORER:
        raise InputError(WHERE, "is none: there is nothing to serve")
    check_files(config.scorers, reward_model_path)
    for name, section in config.scorers.items():
        if isinstance(section, kinds.FunctionConfig):
            load_function(section.path, _where(name, "path"))
        elif isinstance(section, kinds.ForbiddenConfig) and section.function is not None:
            load_function(section.function, _where(name, "function"))
        elif isinstance(section, kinds.JudgeConfig) and section.api_key_variable is not None:
            api_key(section, name)
    if config.needs_reward_model():
        _trained(reward_model_path)
    if config.scorer not in config.scorers and config.scorer != REWARD_MODEL:
        load_function(config.scorer, WHERE)


def build_scorers(config: RewardServiceConfig, reward_model_path: Path | None) -> dict[str, Scorer]:
    """Every scorer of the settings by its name, and what a run uses (`config.scorer`) by its.

    Those that a composite is made of are the same objects. Raises InputError as `check_scorers` does, for a folder
    that is no reward model, and where this machine can't confine code.
    """
    check_scorers(config, reward_model_path)
    return _Building(config, reward_model_path).all()


def load_function(dotted_path: str, where: str = WHERE) -> Callable[..., Any]:
    """The function that ``package.module:function`` names. Raises InputError when it is not to be had."""
    module_name, _, function_name = dotted_path.partition(":")
    if not module_name or not function_name:
        raise InputError(where, f"{dotted_path!r} is neither {REWARD_MODEL!r} nor of the form module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the boundary to a user's scorer: its module may raise anything while imported
        raise InputError(where, f"cannot import {module_name}: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(where, f"module {module_name} has no function {function_name!r}")
    return function  # type: ignore[no-any-return]


class _Building:
    """Builds each scorer once, those that a composite needs before it."""

    def __init__(self, config: RewardServiceConfig, reward_model_path: Path | None) -> None:
        self._config = config
        self._reward_model_path = reward_model_path
        self._built: dict[str, Scorer] = {}

    def all(self) -> dict[str, Scorer]:
        for name in [*self._config.scorers, self._config.scorer]:
            self._get(name)
        return self._built

    def _get(self, name: str) -> Scorer:
        if name not in self._built:
            section = self._config.scorers.get(name)
            self._built[name] = self._unnamed(name) if section is None else self._named(name, section)
        return self._built[name]

    def _unnamed(self, name: str) -> Scorer:
        if name == REWARD_MODEL:
            return self._model(name, _trained(self._reward_model_path))
        return FunctionScorer(name, load_function(name, WHERE))

    def _named(self, name: str, section: Section) -> Scorer:
        if isinstance(section, kinds.TrainedModelConfig):
            return self._model(name, section.path)
        if isinstance(section, kinds.FunctionConfig):
            return FunctionScorer(name, load_function(section.path, _where(name, "path")))
        if isinstance(section, CompositeConfig):
            members = {member: self._get(member) for member in section.members()}
            return CompositeScorer(name, section, members, self._statistics(section))
        if isinstance(section, kinds.JudgeConfig):
            return JudgeScorer(name, section)
        if isinstance(section, kinds.ForbiddenConfig):
            return _forbidden(name, section)
        return _ruled(name, section)

    def _model(self, name: str, folder: Path) -> Scorer:
        from reward_service.scorers.reward_model import RewardModelScorer

        batches = {
            "max_batch_size": self._config.max_batch_size,
            "max_batch_tokens": self._config.max_batch_tokens,
        }
        return RewardModelScorer(folder, name=name, **batches)

    def _statistics(self, section: CompositeConfig) -> Mapping[str, Statistics]:
        return {
            member: given if isinstance(given, Statistics) else read_statistics(self._folder(member))
            for member, given in section.normalize.items()
        }

    def _folder(self, member: str) -> Path:
        section = self._config.scorers.get(member)
        return section.path if isinstance(section, kinds.TrainedModelConfig) else _trained(self._reward_model_path)


def _ruled(name: str, section: Section) -> Scorer:
    """A rule's scorer, with the processes and threads that it needs."""
    version = _version(name, section)
    if isinstance(section, kinds.MathConfig):
        num = section.num_processes
        workers = Workers("math", None, timeout_s=section.timeout_s, num=num)
        rule = checked_rules.math_rule(section, workers)
        return RuleScorer(name, rule, version=version, num_threads=num, on_close=workers.close)
    if isinstance(section, kinds.JsonSchemaConfig):
        schema = read_schema(section)
        workers = Workers("json_schema", schema, timeout_s=section.timeout_s)
        rule = checked_rules.json_schema_rule(section, workers)
        return RuleScorer(name, rule, version=version, on_close=workers.close)
    if isinstance(section, kinds.CodeConfig):
        sandbox.check_confinement(code_rule.limits_of(section), f"reward_service.scorers.{name}")
        return RuleScorer(name, code_rule.code_rule(section), version=version, num_threads=section.num_processes)
    return RuleScorer(name, PURE[type(section)](section), version=version)


def _forbidden(name: str, section: kinds.ForbiddenConfig) -> Scorer:
    phrases = read_phrases(section)
    rule = RuleScorer(name, rules.forbidden_rule(phrases, section.turns), version=_version(name, section, *phrases))
    if section.function is None:
        return rule
    function = FunctionScorer(section.function, load_function(section.function, _where(name, "function")))
    return GuardedScorer(name, rule, function)


def _version(name: str, section: Any, *contents: str) -> str:
    """Name and digest of all that the rule's answers follow from: settings, files, our source, libraries."""
    names = LIBRARIES.get(section.kind, ("regex",))
    libraries = [f"{library} {importlib.metadata.version(library)}" for library in names]
    python = [platform.python_version()] if section.kind == "code" else []
    sources = [HERE / source for source in SOURCES.get(section.kind, ("rules.py",))]
    file = [section.path] if isinstance(section, kinds.JsonSchemaConfig) and section.path is not None else []
    settings = kinds.settings_text(section)
    return f"{name}@{digest_of(settings, *contents, *libraries, *python, *sources, *file)}"


def _where(name: str, field: str) -> str:
    return f"reward_service.scorers.{name}.{field}"


def _trained(folder: Path | None) -> Path:
    if folder is None or not (folder / "config.json").is_file():
        raise InputError(REWARD_MODEL, "not trained (run antiphon reward-model)")
    require_reward_model(folder, REWARD_MODEL)
    return folder
