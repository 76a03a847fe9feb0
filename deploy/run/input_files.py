"""List the inputs of a run: the files whose contents make it the run that it is, by the keys that name them.

Inputs are the model, the data sets, the files of scorers, the chat template and the code of the user's functions.
Models and data sets of the Hub are left out: their commits, which the settings hold, identify them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.config import MayChange
from cluster.data.datasets import data_files
from cluster.errors import InputError
from cluster.hub.names import hub_name
from cluster.model_folder import model_files
from cluster.user_sources import sources
from deploy.config.functions import dotted_paths
from deploy.config.schema import RunConfig, is_template
from deploy.run.artifacts import data_folder
from deploy.run.stages import STAGES

DATA = {"sft": ("sft",), "prompts": ("preferences", "ppo"), "evaluation": ("ppo", "evaluation")}
"""Data set of a task -> stages that read it."""
SCORED = ("ppo", "evaluation")
"""Stages that call scorers."""


@dataclass(frozen=True, slots=True)
class RunInput:
    """An input of a run: the setting that names it and its files, by names that do not depend on where they are.

    name: path or dotted path in the run file. read_by: stages that read it. may_change: as of a setting, for its
    content. is_code: the user's functions; a change is accepted and reported. rescores: rewards depend on it.
    reevaluates: evaluations depend on it.
    """

    key: str
    name: str
    files: dict[str, Path]
    read_by: tuple[str, ...]
    may_change: MayChange = "never"
    is_code: bool = False
    rescores: bool = False
    reevaluates: bool = False


def run_inputs(config: RunConfig, run_path: Path) -> list[RunInput]:
    """Return the inputs that exist now, in the order of the run file."""
    found = [*_model(config, run_path), *_data(config, run_path), *_scorer_files(config), *_functions(config)]
    return [each for each in found if each.files]


def _model(config: RunConfig, run_path: Path) -> Iterator[RunInput]:
    path = config.model.path
    folder = path or run_path / "model"
    if (folder / "config.json").is_file() and (path is None or hub_name(path, "model") is None):
        read_by = ("sft",) if (run_path / "sft" / "config.json").exists() else tuple(STAGES)
        files = {file.relative_to(folder).as_posix(): file for file in model_files(folder)}
        yield RunInput("model.path" if path else "model.builder", str(path or "RUN/model"), files, read_by)
    template = config.model.chat_template
    if template is not None and not is_template(template) and Path(template).is_file():
        yield RunInput("model.chat_template", template, {Path(template).name: Path(template)}, tuple(STAGES))


def _data(config: RunConfig, run_path: Path) -> Iterator[RunInput]:
    for task, section in config.by_task().items():
        for name, stages in DATA.items():
            path, read_by = getattr(section, name), tuple[str, ...](stages)
            key = config.key_of(task, name if path else "builder")
            held_out = name == "evaluation"
            if name == "prompts" and not section.evaluation and not _built(run_path, task, "evaluation").exists():
                read_by = (*read_by, "evaluation")
            files = _data_files(path or _built(run_path, task, name))
            label = str(path) if path else f"RUN/{_built(run_path, task, name).relative_to(run_path)}"
            key = key if path else f"{key} ({name})"
            may_change: MayChange = "always" if held_out and path else "never"
            yield RunInput(key, label, files, read_by, may_change, reevaluates=held_out, rescores=held_out)
    if config.data.preferences is not None:
        read = tuple(name for name, stage in STAGES.items() if "preferences" in stage.needs)
        yield RunInput("data.preferences", str(config.data.preferences), _data_files(config.data.preferences), read)


def _built(run_path: Path, task: str, name: str) -> Path:
    return data_folder(run_path, task) / f"{name}.parquet"


def _data_files(path: Path) -> dict[str, Path]:
    """Return the files of a data set; none if it is on the Hub or does not exist (its reader reports that)."""
    if hub_name(path, "dataset") is not None or not path.exists():
        return {}
    return {file.relative_to(path.parent).as_posix(): file for file in data_files(path)}


def _scorer_files(config: RunConfig) -> Iterator[RunInput]:
    for name, scorer in config.reward_service.scorers.items():
        path = getattr(scorer, "path", None)
        if not isinstance(path, Path) or hub_name(path, "model") is not None or not path.exists():
            continue
        inner = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        files = {file.relative_to(path.parent).as_posix(): file for file in inner}
        key = f"reward_service.scorers.{name}.path"
        yield RunInput(key, str(path), files, SCORED, "recorded", rescores=True, reevaluates=True)


def _functions(config: RunConfig) -> Iterator[RunInput]:
    """Yield the code of the user's functions, except those that leave nothing but files: builders and annotators."""
    for key, path in dotted_paths(config).items():
        field = key.rpartition(".")[2]
        if field in ("builder", "annotator", "oracle", "weight_carrier"):
            continue
        scores = key.startswith("reward_service.") or field in ("scorer", "path")
        try:
            files = sources(path, key)
        except InputError:  # it is reported where the function is loaded
            continue
        if key == "learner.advantages":
            yield RunInput(key, path, files, ("ppo",), "recorded")
        else:
            yield RunInput(key, path, files, SCORED, "always", is_code=True, rescores=scores, reevaluates=True)
