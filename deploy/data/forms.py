"""Finds out whether a run's data sets hold conversations or texts, from their columns alone."""

from __future__ import annotations

from pathlib import Path

from cluster.data.datasets import Kind, Reading, describe
from deploy.config.schema import RunConfig
from deploy.run.artifacts import data_path


def holds_conversations(path: Path, kind: Kind, reading: Reading) -> bool:
    """Return whether a data set of this kind holds messages. Raises InputError naming a wrong file or column."""
    return describe(path, kind, reading.columns).form.conversational


def is_conversational(config: RunConfig, run_path: Path, task: str) -> bool | None:
    """Return whether a task's prompts, or its examples if it has only those, are conversations.

    Returns None if the run has neither data set, or has them no longer.
    """
    if config.data.as_messages:
        return True
    kinds: tuple[Kind, ...] = ("prompts", "sft")
    for kind in kinds:
        path = data_path(config, run_path, kind, task)
        if path.exists():
            return holds_conversations(path, kind, config.data.reading())
    return None
