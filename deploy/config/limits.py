"""Check the run's lengths against what its models can read. Opens only config.json files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.errors import InputError
from cluster.files import read_json
from cluster.model_folder import text_settings
from cluster.model_limits import context_length
from deploy.config.checks import check_context_length
from deploy.config.model_checks import check_rope
from deploy.config.schema import RunConfig
from reward_service.config.composite import reached
from reward_service.config.scorers import TrainedModelConfig
from reward_service.config.service import REWARD_MODEL
from rollout_actors.config import max_sequence_tokens


def check_limits(config: RunConfig, settings: Mapping[str, Any], folder: Path) -> int | None:
    """Return the context of the model whose config.json holds `settings`, or None if it has no limit.

    Raises InputError naming the setting that allows sequences which this model, or a reward model, cannot read.
    """
    context = context_length(settings)
    if context is not None:
        named = f"max_position_embeddings of {folder}"
        check_context_length(config, context, named)
        _check_supervised(config, context, named)
    longest = max_sequence_tokens(config.rollout_actors, [task.environment for task in config.by_task().values()])
    check_rope(settings, folder, longest)
    _check_window(config, text_settings(settings), folder, longest)
    for scorer, limit, named in _reward_models(config, context, folder):
        _check_reward_model(config, scorer, limit, named)
    return context


def _check_supervised(config: RunConfig, context: int, named: str) -> None:
    for stage, section in (("sft", config.sft), ("dpo", config.dpo), ("reward_model", config.reward_model)):
        if stage in config.run.stages and section.max_tokens is not None and section.max_tokens > context:
            raise InputError(f"{stage}.max_tokens", f"{section.max_tokens} tokens, but {named} is {context}")


def _check_window(config: RunConfig, text: Mapping[str, Any], folder: Path, longest: int) -> None:
    """Raise InputError if packed sequences may be longer than the window of the model's attention."""
    slides = text.get("use_sliding_window", not str(text.get("model_type")).startswith("qwen"))
    window = text.get("sliding_window") if slides else None
    if config.learner.packing and window is not None and longest > int(window):
        what = f"sequences may have {longest} tokens, but the attention window of {folder} is {window}: set it false"
        raise InputError("learner.packing", what)


def _reward_models(config: RunConfig, context: int | None, folder: Path) -> Iterator[tuple[str, int, str]]:
    """Yield the name of each reward model, its context and where that is stated."""
    if context is not None:
        yield REWARD_MODEL, context, f"max_position_embeddings of {folder}"
    for name, scorer in config.reward_service.scorers.items():
        if isinstance(scorer, TrainedModelConfig) and (scorer.path / "config.json").is_file():
            limit = context_length(read_json(scorer.path / "config.json"))
            if limit is not None:
                yield name, limit, f"max_position_embeddings of {scorer.path}"


def _check_reward_model(config: RunConfig, name: str, limit: int, named: str) -> None:
    """Raise InputError if a prompt, its response and the end of sequence are more than a reward model reads."""
    actors = config.rollout_actors
    longest = actors.max_prompt_tokens + actors.max_response_tokens + 1
    tasks = [task for task in config.by_task().values() if task.environment.path is None]
    if longest > limit and any(name in reached(task.scorer, config.reward_service.scorers) for task in tasks):
        parts = f"{actors.max_prompt_tokens} max_prompt_tokens + {actors.max_response_tokens} + the end of sequence"
        what = f"{parts} = {longest} tokens for the scorer {name}, but {named} is {limit}"
        raise InputError("rollout_actors.max_response_tokens", what)
