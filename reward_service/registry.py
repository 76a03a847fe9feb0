"""From the scorer's name in the run file to the scorer. Imports torch only when a reward model is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.errors import InputError
from reward_service.config import REWARD_MODEL, RewardServiceConfig
from reward_service.scorer import FunctionScorer, Scorer

WHERE = "reward_service.scorer"


def check_scorers(config: RewardServiceConfig, reward_model_path: Path | None) -> None:
    """Raise InputError when the configured scorer can't exist: an untrained reward model, a function not found."""
    if config.scorer == REWARD_MODEL:
        _trained(reward_model_path)
    else:
        load_function(config.scorer)


def build_scorer(config: RewardServiceConfig, reward_model_path: Path | None) -> Scorer:
    """The configured scorer, loaded. Raises InputError as `check_scorers` does, and for a folder that is no model."""
    if config.scorer != REWARD_MODEL:
        return FunctionScorer(config.scorer, load_function(config.scorer))
    folder = _trained(reward_model_path)
    from reward_service.reward_model import RewardModelScorer

    return RewardModelScorer(folder, max_batch_size=config.max_batch_size)


def build_scorers(config: RewardServiceConfig, reward_model_path: Path | None) -> dict[str, Scorer]:
    """All scorers by name."""
    return {config.scorer: build_scorer(config, reward_model_path)}


def load_function(dotted_path: str) -> Callable[..., Any]:
    """The function that ``package.module:function`` names. Raises InputError when it is not to be had."""
    module_name, _, function_name = dotted_path.partition(":")
    if not module_name or not function_name:
        raise InputError(WHERE, f"{dotted_path!r} is neither {REWARD_MODEL!r} nor of the form module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the boundary to a user's scorer: its module may raise anything while imported
        raise InputError(WHERE, f"cannot import {module_name}: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(WHERE, f"module {module_name} has no function {function_name!r}")
    return function  # type: ignore[no-any-return]


def _trained(folder: Path | None) -> Path:
    if folder is None or not (folder / "config.json").is_file():
        raise InputError(REWARD_MODEL, "not trained (run antiphon reward-model)")
    return folder
