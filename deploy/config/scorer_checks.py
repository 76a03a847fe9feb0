"""Check that the data sets have the columns which scorers and metrics need, without importing the user's functions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.data.datasets import describe
from cluster.errors import InputError
from cluster.hub.download import local_data
from cluster.user_code import locate, signature_in_source
from deploy.config.functions import scorer_paths
from deploy.config.schema import RunConfig
from reward_service.config.composite import reached
from reward_service.config.scorers import ScorerSection
from reward_service.functions.results import SignatureMismatch
from reward_service.functions.signatures import OF_RUNS, check_fit, required_columns

Columns = Mapping[str, Mapping[Path, Sequence[str]]]
"""Task -> its data sets of prompts -> the columns of each, besides the prompt."""


def check_scorer_columns(config: RunConfig, columns: Columns) -> None:
    """Raise InputError for a scorer or metric that needs a column which a task's prompts lack.

    A task whose data sets a builder writes is not looked at, nor is a function whose parameters its source does not
    tell; both are tried before training.
    """
    for task, data in columns.items():
        for path, names in data.items():
            if config.reward_service.url is None:
                _check_kinds(config, task, path, names)
                for key, function in _functions(config, task).items():
                    _check_function(key, function, path, names)
            _check_metrics(config, task, path, names)


def columns_of_prompts(config: RunConfig) -> Columns:
    """Return the columns of every task's prompts and held-out prompts, as far as the run file names data sets."""
    return {
        name: {path: _names(config, path) for path in (task.prompts, task.evaluation) if path is not None}
        for name, task in config.by_task().items()
    }


def _names(config: RunConfig, path: Path) -> list[str]:
    described = describe(local_data(path), "prompts", config.data.reading().columns)
    return [name for name in described.columns if name != "prompt"]


def _functions(config: RunConfig, task: str) -> dict[str, str]:
    """Return the functions that score a task's responses, by key; not those that are only served."""
    scorers = reached(config.by_task()[task].scorer, config.reward_service.scorers)
    unused = [f"reward_service.scorers.{name}." for name in config.reward_service.scorers if name not in scorers]
    paths = scorer_paths(config, task)
    return {key: path for key, path in paths.items() if not key.startswith(tuple(unused))}


def _check_kinds(config: RunConfig, task: str, path: Path, names: Sequence[str]) -> None:
    service, scorer = config.reward_service, config.by_task()[task].scorer
    for name in sorted(reached(scorer, service.scorers) & set(service.scorers)):
        section = service.scorers[name]
        needed = section.needs() if isinstance(section, ScorerSection) else ()
        for column in (column for column in needed if column not in names):
            what = (
                f"needs the column {column!r}, and {path} has {_listed(names)}: add it, or rename one in data.columns"
            )
            raise InputError(f"reward_service.scorers.{name}", what)


def _check_function(key: str, function: str, path: Path, names: Sequence[str]) -> None:
    signature = signature_in_source(function, key)
    try:
        if signature is not None:
            check_fit(signature, {*names, *OF_RUNS})
    except SignatureMismatch as error:
        what = f"{function} ({locate(function, key)}) {error}; {path} has {_listed(names)}"
        raise InputError(key, what) from error


def _check_metrics(config: RunConfig, task: str, path: Path, names: Sequence[str]) -> None:
    function, key = config.by_task()[task].metrics, config.key_of(task, "metrics")
    signature = signature_in_source(function, key) if function is not None else None
    for name in _missing(signature, names) if signature is not None else ():
        what = f"{function} ({locate(str(function), key)}) needs the column {name!r}; {path} has {_listed(names)}"
        raise InputError(key, what)


def _missing(signature: inspect.Signature, names: Sequence[str]) -> list[str]:
    return [name for name in required_columns(signature, num_texts=2) if name not in names]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "no columns besides the prompt"
