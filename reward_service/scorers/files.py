"""Reads the files of scorer settings: phrases, JSON schemas, statistics, reward model folders.

Every function raises InputError that names the file. Imports no torch, so that checking a run file is fast.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.errors import InputError
from cluster.files import digest_files
from cluster.model_folder import weight_files
from reward_service.config.composite import REWARD_MODEL, Statistics
from reward_service.config.scorers import ForbiddenConfig, JsonSchemaConfig, check_json_schema

REWARD_STATISTICS = "reward_statistics.json"
UNSAFE_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.h5", "*.msgpack", "*.joblib")


def read_phrases(config: ForbiddenConfig) -> list[str]:
    """Return all forbidden phrases: those of the settings and those of the file."""
    if config.path is None:
        return list(config.phrases)
    lines = [line.strip() for line in _read(config.path).splitlines()]
    if not any(lines):
        raise InputError(str(config.path), "has no phrases: write one per line")
    return [*config.phrases, *filter(None, lines)]


def read_schema(config: JsonSchemaConfig) -> dict[str, Any]:
    """Return the JSON schema from the settings or their file."""
    if config.path is None:
        assert config.json_schema is not None
        return config.json_schema
    schema = _read_object(config.path)
    try:
        check_json_schema(schema)
    except ValueError as error:
        raise InputError(str(config.path), str(error)) from error
    return schema


def read_statistics(folder: Path) -> Statistics:
    """Return the mean and std of a reward model's rewards, which training saved beside its weights."""
    path = folder / REWARD_STATISTICS
    values = _read_object(path)
    try:
        return Statistics.model_validate({key: values.get(key) for key in ("mean", "std")}, strict=True)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        raise InputError(str(path), f"{detail['loc'][0]}: {detail['msg']}, got {detail['input']!r}") from error


def require_reward_model(folder: Path, where: str) -> None:
    """Raise InputError if the folder is not a safetensors model, or also has weights in a pickle format."""
    if not (folder / "config.json").is_file():
        raise InputError(where, f"no reward model in {folder}: it has no config.json")
    require_safetensors(folder, where)


def require_safetensors(folder: Path, where: str) -> None:
    """Raise InputError if the folder has no safetensors or not all of them, or has weights in another format."""
    try:
        weight_files(folder)
    except InputError as error:
        raise InputError(where, f"no usable weights: {error}") from error
    unsafe = sorted(path for pattern in UNSAFE_WEIGHTS for path in folder.glob(pattern))
    if unsafe:
        raise InputError(where, f"{unsafe[0]} is not safetensors, and no other format is loaded: remove the file")


def member_folders(folder: Path) -> list[Path]:
    """Return the folders `member-1`, `member-2`, ... of an ensemble, in order.

    Raises InputError if one is missing.
    """
    found = {path.name for path in folder.glob("member-*") if path.is_dir()}
    members = [f"member-{number}" for number in range(1, len(found) + 1)]
    if found != set(members):
        missing = sorted(set(members) - found)
        raise InputError(REWARD_MODEL, f"{folder} has {', '.join(sorted(found))} but no {', '.join(missing)}")
    return [folder / member for member in members]


def weights_digest(folder: Path) -> str:
    """Return a digest of a reward model's weights and those of all its ensemble members.

    Raises InputError for weights that are not safetensors.
    """
    folders = [folder, *member_folders(folder)]
    for each in folders:
        require_safetensors(each, REWARD_MODEL)
    return digest_files([path for each in folders for path in weight_files(each)])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(str(path), f"cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise InputError(str(path), f"not JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(str(path), "not a JSON object")
    return content
