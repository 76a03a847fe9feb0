"""Checks and builds the scorers of the run file's settings.

Imports torch only to build a reward model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cluster.config import Section
from cluster.errors import InputError
from reward_service.config.composite import REWARD_MODEL
from reward_service.config.scorers import TrainedModelConfig
from reward_service.config.service import NO_SCORER, RewardServiceConfig
from reward_service.functions.process import check_path
from reward_service.scorers import checked_rules, code_rule, composite, forbidden, function, judge, rules, trained_model
from reward_service.scorers.files import require_reward_model
from reward_service.scorers.function import FunctionScorer
from reward_service.scorers.scorer import Scorer, kind_of
from reward_service.scorers.trained_model import reward_model_scorer

WHERE = "reward_service.scorer"
KIND_MODULES = (checked_rules, code_rule, composite, forbidden, function, judge, rules, trained_model)
"""The modules that register scorer kinds when they are imported."""


def check_scorers(config: RewardServiceConfig, reward_model_path: Path | None) -> None:
    """Raise InputError for a scorer that lacks its reward model, function, file or key."""
    _check_settings(config, reward_model_path)
    for name, section in config.scorers.items():
        kind_of(name, section).check_environment(name, section)
    if _is_function(config):
        check_path(config.scorer, WHERE)


def _check_settings(config: RewardServiceConfig, reward_model_path: Path | None) -> None:
    if config.scorer == NO_SCORER:
        raise InputError(WHERE, "is none: there is nothing to serve")
    check_files(config.scorers, reward_model_path)
    if config.needs_reward_model():
        _trained(reward_model_path)
    if _is_function(config) and ":" not in config.scorer:
        raise InputError(WHERE, f"{config.scorer!r} is neither {REWARD_MODEL!r} nor of the form module:function")


def _is_function(config: RewardServiceConfig) -> bool:
    return config.scorer not in config.scorers and config.scorer != REWARD_MODEL


def check_files(scorers: Mapping[str, Section], reward_model_path: Path | None) -> None:
    """Raise InputError for the first file or folder of a scorer that is missing or invalid."""
    folders = {name: section.folder() for name, section in scorers.items() if isinstance(section, TrainedModelConfig)}
    if reward_model_path is not None:
        folders[REWARD_MODEL] = reward_model_path
    for name, section in scorers.items():
        kind_of(name, section).check_files(name, section, folders)


def build_scorers(config: RewardServiceConfig, reward_model_path: Path | None) -> dict[str, Scorer]:
    """Return every scorer of the settings by its name, and the run's scorer under `config.scorer`.

    A composite shares the scorers that it is made of. Raises InputError as `check_scorers` does, for a folder that is
    not a reward model, and if this machine can't run code in a sandbox.
    """
    _check_settings(config, reward_model_path)
    return _ScorerBuilder(config, reward_model_path).all()


class _ScorerBuilder:
    """Builds each scorer once, the scorers of a composite before the composite."""

    def __init__(self, config: RewardServiceConfig, reward_model_path: Path | None) -> None:
        self.max_batch_size = config.max_batch_size
        self.max_batch_tokens = config.max_batch_tokens
        self.timeout_s = config.timeout_s
        self._config = config
        self._reward_model_path = reward_model_path
        self._built: dict[str, Scorer] = {}

    def all(self) -> dict[str, Scorer]:
        for name in [*self._config.scorers, self._config.scorer]:
            self.scorer(name)
        return self._built

    def scorer(self, name: str) -> Scorer:
        if name not in self._built:
            section = self._config.scorers.get(name)
            if section is not None:
                self._built[name] = kind_of(name, section).build(name, section, self)
            elif name == REWARD_MODEL:
                self._built[name] = reward_model_scorer(name, self)
            else:
                self._built[name] = FunctionScorer(name, name, WHERE, timeout_s=self.timeout_s)
        return self._built[name]

    def reward_model_folder(self, name: str) -> Path:
        section = self._config.scorers.get(name)
        return section.folder() if isinstance(section, TrainedModelConfig) else _trained(self._reward_model_path)


def _trained(folder: Path | None) -> Path:
    if folder is None or not (folder / "config.json").is_file():
        raise InputError(REWARD_MODEL, "not trained (run antiphon reward-model)")
    require_reward_model(folder, REWARD_MODEL)
    return folder
