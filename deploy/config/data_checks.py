"""Check the data sets that the run file names: their columns and forms, and whether they fit each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cluster.data.datasets import Description, Kind, column_names, describe
from cluster.data.reading.columns import source_of
from cluster.errors import InputError
from cluster.hub.download import local_data
from deploy.config.chat import described_texts, template_of
from deploy.config.schema import RunConfig

KINDS: dict[str, Kind] = {"sft": "sft", "prompts": "prompts", "preferences": "preferences", "evaluation": "prompts"}
"""Data set of the run file -> kind of its rows."""


class DataSet(NamedTuple):
    """A data set that the run file names: its task, its key there, and its kind."""

    task: str
    key: str
    path: Path
    kind: Kind

    @property
    def name(self) -> str:
        """Return the name that is printed."""
        return f"{self.task}.{self.key}" if self.task else self.key


def data_sets(config: RunConfig) -> list[DataSet]:
    """Return the data sets that the run file names."""
    named = {"": config.data, **config.tasks}
    return [
        DataSet(task, key, path, kind)
        for task, section in named.items()
        for key, kind in KINDS.items()
        if (path := getattr(section, key, None)) is not None
    ]


def check_data_sets(config: RunConfig) -> list[str]:
    """Return a line for each data set. Raises InputError naming the key, file or column that is wrong."""
    found = data_sets(config)
    _check_columns(config, [data.path for data in found])
    described = {data: describe(local_data(data.path), data.kind, config.data.columns) for data in found}
    for data, description in described.items():
        _check_template(config, data.path, description)
    if not config.data.as_messages:
        _check_together(described)
    return [f"{data.name:<12} {data.path} ({_line(config, description)})" for data, description in described.items()]


def recognised(config: RunConfig) -> list[str]:
    """Return a line for each data set whose columns are not named like ours: how they are understood."""
    described = ((data, describe(local_data(data.path), data.kind, config.data.columns)) for data in data_sets(config))
    return [f"{data.name}: {'; '.join(each.notes)}" for data, each in described if each.notes]


def _check_columns(config: RunConfig, paths: Sequence[Path]) -> None:
    """Raise InputError naming a column that no data set has; not checked if a builder writes data sets."""
    if any(task.builder for task in config.by_task().values()) or not config.data.columns:
        return
    names = {name for path in paths for name in column_names(local_data(path))}
    for ours, theirs in config.data.columns.items():
        if source_of(dict.fromkeys(names), theirs) is None:
            what = f"no data set has a column {theirs!r}; they have {', '.join(sorted(names))}"
            raise InputError(f"data.columns.{ours}", what)


def _check_template(config: RunConfig, path: Path, description: Description) -> None:
    if description.form.conversational and config.model.path is not None and template_of(config) is None:
        raise InputError(str(path), f"holds messages, but the tokenizer of {config.model.path} has no chat template")


def _check_together(described: Mapping[DataSet, Description]) -> None:
    """Raise InputError if preferences are texts, but prompts messages, or the other way round.

    A reward model that was trained on the one would score the other.
    """
    preferences = [(data, each) for data, each in described.items() if data.kind == "preferences"]
    for data, prompts in described.items():
        for labelled, pairs in preferences if data.key == "prompts" else ():
            if pairs.form.conversational != prompts.form.conversational:
                kinds = {True: "messages", False: "texts"}
                what = f"holds {kinds[pairs.form.conversational]}, but {data.path} {kinds[prompts.form.conversational]}"
                fix = "the reward model would score what it was not trained on: use the same kind in both"
                raise InputError(str(labelled.path), f"{what}; {fix}")


def _line(config: RunConfig, description: Description) -> str:
    num_rows = description.num_rows
    if description.form.conversational:
        return "; ".join([f"{num_rows:,} rows of messages", *description.notes])
    return "; ".join([described_texts(config, num_rows, description.first), *description.notes])
