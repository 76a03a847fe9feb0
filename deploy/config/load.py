"""Read a run file (TOML) into a frozen `RunConfig`, and refuse settings that do not fit together.

Opens only the run file; `deploy.config.inputs` checks the model and the data sets. Imports neither torch nor ray.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from cluster.config import Section
from cluster.errors import InputError
from cluster.user_code import search_in
from deploy.config.checks import check_fit
from deploy.config.errors import input_error
from deploy.config.functions import dotted_paths
from deploy.config.schema import (
    RunConfig,
    is_template,
)

T = TypeVar("T", bound=Section)
PACKAGES = ("cluster", "rollout_actors", "reward_service", "learner", "deploy")


def load_run_config(
    path: Path, overrides: Sequence[str] = (), *, beside: bool = True, option: str = "--set"
) -> RunConfig:
    """Read a run file, then each override: one more line of TOML, such as ``learner.learning_rate = 5e-7``.

    `option` is the command-line option of the overrides. A relative path to a model or a data set is looked for beside
    the run file, then in the working directory; with `beside=False`, as for the resolved file in a run directory, in
    the working directory, then in that of the run's last command. A path below the working directory stays relative, so
    that a run can resume in another copy of the repository. Raises InputError naming the key.
    """
    settings = _read(path)
    for line in overrides:
        settings = _merged(settings, _parse_line(line, option))
    config = _validated(settings)
    config, folders = (config, [path.parent]) if beside else _own_folders(config)
    config = _with_paths(config, folders)
    if not config.run.name:
        config = _replaced(config, "run", name=path.resolve().parent.name)
    config = _with_modules(config, folders)
    check_fit(config)
    return config


def read_run_config(path: Path) -> RunConfig:
    """Read the resolved run file of a run without checking whether its settings fit together.

    Finds relative paths and modules as `load_run_config` does with `beside=False`.
    """
    config, folders = _own_folders(_validated(_read(path)))
    return _with_modules(_with_paths(config, folders), folders, refuse_hidden=False)


def _own_folders(config: RunConfig) -> tuple[RunConfig, list[Path]]:
    """Return the settings without a run's working directory, and the folders to which its relative paths may belong."""
    own = config.run.working_directory
    return _replaced(config, "run", working_directory=None), [Path(), *([own] if own is not None else [])]


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


def _with_paths(config: RunConfig, folders: Sequence[Path]) -> RunConfig:
    config = config.model_copy(update={"model": _found(config.model, folders), "data": _found(config.data, folders)})
    template = config.model.chat_template
    if template is not None and not is_template(template):
        config = _replaced(config, "model", chat_template=str(_resolved(Path(template), folders)))
    tasks = {name: _found(task, folders) for name, task in config.tasks.items()}
    config = config.model_copy(update={"tasks": tasks})
    scorers = {}
    for name, scorer in config.reward_service.scorers.items():
        path = getattr(scorer, "path", None)
        found = {"path": _resolved(path, folders)} if isinstance(path, Path) else {}
        scorers[name] = scorer.model_copy(update=found)
    return _replaced(config, "reward_service", scorers=scorers)


def _with_modules(config: RunConfig, beside: Sequence[Path], *, refuse_hidden: bool = True) -> RunConfig:
    """Make the modules of the run's dotted paths importable, those in the folders `beside` the run file too."""
    if refuse_hidden:
        refuse_hidden_packages([Path.cwd(), *beside])
    folders = [_resolved(path, beside) for path in config.run.module_folders]
    modules = {path.partition(":")[0].partition(".")[0] for path in dotted_paths(config).values()}
    for folder in beside:
        if any(_has_module(folder, name) and not _has_module(Path.cwd(), name) for name in modules):
            folders.append(_resolved(Path(), [folder]))
    folders = list(dict.fromkeys(folders))
    for path in folders:
        search_in(path)
    return _replaced(config, "run", module_folders=tuple(folders))


def _has_module(folder: Path, name: str) -> bool:
    return (folder / f"{name}.py").is_file() or any((folder / name).glob("*.py"))


def refuse_hidden_packages(folders: Sequence[Path]) -> None:
    """Raise InputError for a module in one of `folders` that has the name of a package of Antiphon."""
    own = Path(__file__).resolve().parents[2]
    for folder in dict.fromkeys(folder.resolve() for folder in folders):
        for name in PACKAGES if folder != own else ():
            if _has_module(folder, name):
                module = folder / f"{name}.py" if (folder / f"{name}.py").is_file() else folder / name
                what = f"Antiphon has a package {name!r}: give this module another name"
                raise InputError(str(module), f"{what}, or install Antiphon from this folder if it is a checkout")


def _found(section: T, folders: Sequence[Path]) -> T:
    """Return the section with its paths resolved."""
    paths = {key: _resolved(value, folders) for key, value in section if isinstance(value, Path)}
    return section.model_copy(update=paths)


def _resolved(path: Path, folders: Sequence[Path]) -> Path:
    """Return the path in the first folder that has it, else in the working directory; relative if it is below that."""
    path = path.expanduser()
    found = next((folder / path for folder in folders if (folder / path).exists()), path)
    absolute, working_directory = Path(os.path.abspath(found)), Path.cwd()
    return absolute.relative_to(working_directory) if absolute.is_relative_to(working_directory) else absolute


def _replaced(config: RunConfig, section: str, **values: Any) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
