"""Check what the run file names (model folder, data sets, functions) before anything starts.

Takes less than two seconds: reads config.json, tokenizer.json and the schemas of data sets, and finds functions by
parsing their files. Imports neither torch nor ray nor transformers, nor any of the user's modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import InputError
from cluster.files import read_json
from cluster.hub.download import local_model
from cluster.model_folder import require_no_adapter, text_settings
from cluster.user_code import locate
from deploy.config.chat import check_chat
from deploy.config.data_checks import check_data_sets
from deploy.config.functions import dotted_paths
from deploy.config.limits import check_limits
from deploy.config.model_checks import check_adapters, check_architecture
from deploy.config.schema import RunConfig
from deploy.config.scorer_checks import check_scorer_columns, columns_of_prompts
from reward_service.config.composite import CompositeConfig
from reward_service.config.scorers import ScorerConfig
from reward_service.scorers.registry import check_files
from rollout_actors.config import EnvironmentConfig
from rollout_actors.engine.arguments import check_arguments
from rollout_actors.parser_choice import choose_parsers, require_known

RESIZING = (
    "resize its embeddings to the tokenizer and save both (model.resize_token_embeddings(len(tokenizer)); "
    "model.save_pretrained('{folder}'))"
)
TRAINED_DTYPES = ("float32", "bfloat16")


def check_inputs(config: RunConfig) -> list[str]:
    """Return a line for each input of the run. Raises InputError naming the key, file or column that is wrong."""
    lines = []
    check_chat(config)
    check_arguments(config.rollout_actors.engine)
    if config.model.path is not None:
        folder = local_model(config.model.path, weights=False)
        lines.append(f"model        {config.model.path} ({check_model(config, folder)})")
    lines += check_data_sets(config)
    for key, dotted_path in dotted_paths(config).items():
        lines.append(f"{key.partition('.')[2]:<12} {dotted_path} ({locate(dotted_path, key)})")
    for key, task in config.by_task().items():
        lines += _parsers(config, f"{key}." if key else "", task.environment)
    check_scorer_columns(config, columns_of_prompts(config))
    check_files(config.reward_service.scorers, None)
    lines += [f"scorers.{name} {_described(scorer)}" for name, scorer in config.reward_service.scorers.items()]
    lines += _lora_line(config)
    constraint = config.learner.constraint
    if constraint.cost is not None:
        lines.append(f"constraint   mean of {constraint.cost} at most {constraint.max_mean:g}")
    return lines


def _parsers(config: RunConfig, prefix: str, environment: EnvironmentConfig) -> list[str]:
    """Return a line on how the responses to an environment are read. Raises InputError if a parser is unknown."""
    if environment.path is None:
        return []
    require_known("tool", environment.tool_parser)
    require_known("reasoning", environment.reasoning_parser)
    if config.model.path is None:
        return []
    chosen = choose_parsers(local_model(config.model.path, weights=False), environment)
    return [f"{prefix}environment  calls in the form {chosen.tool}, thoughts in the form {chosen.reasoning}"]


def _lora_line(config: RunConfig) -> list[str]:
    """Describe which stages train adapters, if one of the others trains every weight."""
    whole = [stage for stage in config.run.stages if stage not in ("preferences", "ppo", "evaluation")]
    if not config.learner.lora.rank or not whole:
        return []
    return [f"lora         ppo trains adapters of rank {config.learner.lora.rank}; {', '.join(whole)}: every weight"]


def _described(scorer: ScorerConfig) -> str:
    if isinstance(scorer, CompositeConfig):
        return f"composite of {', '.join(scorer.members())}"
    path = getattr(scorer, "path", None)
    return scorer.kind if path is None else f"{scorer.kind} {path}"


def check_model(config: RunConfig, folder: Path) -> str:
    """Check a model folder and describe its model."""
    if not folder.is_dir():
        raise InputError("model.path", f"no such folder: {folder}")
    require_no_adapter(folder)
    settings = read_json(folder / "config.json")
    check_architecture(settings, folder, has_weights=folder == config.model.path)
    if folder == config.model.path:
        check_adapters(config.learner.lora, settings, folder)
    vocab_size = _check_tokenizer(folder)
    text = text_settings(settings)
    if vocab_size > int(text.get("vocab_size", vocab_size)):
        what = f"has tokens up to number {vocab_size - 1}, the model only {text['vocab_size']}"
        raise InputError(str(folder / "tokenizer.json"), f"{what}: {RESIZING.format(folder=folder)}")
    context = check_limits(config, settings, folder)
    if config.model.dtype == "auto":
        dtype_of_weights(settings, folder)
    architecture = (settings.get("architectures") or [settings.get("model_type", "unknown architecture")])[0]
    return f"{architecture}, {vocab_size} tokens, context {context or 'unknown'}"


def dtype_of_weights(settings: Mapping[str, Any], folder: Path) -> str:
    """Return the dtype that a model's config.json names, or float32. Raises InputError for one that is not trained.

    float16 has too little range for weights in training: most updates of a small learning rate are rounded away.
    """
    text = settings.get("text_config", settings)
    named = (table.get(key) for table in (settings, text) for key in ("dtype", "torch_dtype"))
    dtype = str(next(filter(None, named), "float32")).removeprefix("torch.")
    if dtype not in TRAINED_DTYPES:
        raise InputError("model.dtype", f'the weights of {folder} are {dtype}: set it to "float32" or "bfloat16"')
    return dtype


def _check_tokenizer(folder: Path) -> int:
    """Return the highest token number and one. Raises InputError if no tokenizer can be loaded."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.exists():
        raise InputError(str(path), "missing")
    try:
        return max(Tokenizer.from_file(str(path)).get_vocab().values(), default=-1) + 1
    except Exception as error:
        raise InputError(str(path), f"not a tokenizer ({error})") from error
