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
    the run file, then in the working directory (with `beside=False`, as for the resolved file in a run directory, only
    there). A path below the working directory stays relative, so that a run can resume in another copy of the
    repository. Raises InputError naming the key.
    """
    settings = _read(path)
    for line in overrides:
        settings = _merged(settings, _parse_line(line, option))
    config = _validated(settings)
    config = _with_paths(config, path.parent if beside else Path())
    if not config.run.name:
        config = _replaced(config, "run", name=path.resolve().parent.name)
    config = _with_modules(config, path.parent if beside else Path())
    check_fit(config)
    return config


def read_run_config(path: Path) -> RunConfig:
    """Read a resolved run file without checking whether its settings fit together."""
    return _validated(_read(path))


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


def _with_paths(config: RunConfig, folder: Path) -> RunConfig:
    config = config.model_copy(update={"model": _found(config.model, folder), "data": _found(config.data, folder)})
    template = config.model.chat_template
    if template is not None and not is_template(template):
        config = _replaced(config, "model", chat_template=str(_resolved(Path(template), folder)))
    tasks = {name: _found(task, folder) for name, task in config.tasks.items()}
    config = config.model_copy(update={"tasks": tasks})
    scorers = {}
    for name, scorer in config.reward_service.scorers.items():
        path = getattr(scorer, "path", None)
        found = {"path": _resolved(path, folder)} if isinstance(path, Path) else {}
        scorers[name] = scorer.model_copy(update=found)
    return _replaced(config, "reward_service", scorers=scorers)


def _with_modules(config: RunConfig, folder: Path) -> RunConfig:
    """Make the modules of the run's dotted paths importable, those beside the run file too."""
    refuse_hidden_packages([Path.cwd(), folder])
    folders = [_resolved(path, folder) for path in config.run.module_folders]
    modules = {path.partition(":")[0].partition(".")[0] for path in dotted_paths(config).values()}
    if any(_has_module(folder, name) and not _has_module(Path.cwd(), name) for name in modules):
        folders.append(_resolved(Path(), folder))
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


def _found(section: T, folder: Path) -> T:
    """Return the section with its paths resolved."""
    paths = {key: _resolved(value, folder) for key, value in section if isinstance(value, Path)}
    return section.model_copy(update=paths)


def _resolved(path: Path, folder: Path) -> Path:
    path = path.expanduser()
    found = folder / path if (folder / path).exists() else path
    absolute, working_directory = Path(os.path.abspath(found)), Path.cwd()
    return absolute.relative_to(working_directory) if absolute.is_relative_to(working_directory) else absolute


def _replaced(config: RunConfig, section: str, **values: Any) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
