"""Sets the default learning rate of PPO by the size of the policy. Reads the headers of its weight files only."""

from __future__ import annotations

import json
import math
from pathlib import Path

from cluster.errors import InputError
from deploy.config.schema import RunConfig
from learner.learning_rates import default_learning_rate

INDEX = "model.safetensors.index.json"
_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header, a little-endian integer of so many bytes."""


def with_learning_rate(config: RunConfig, policy: Path) -> RunConfig:
    """Return the settings with the learning rate that PPO trains this policy with, if they leave it open."""
    learner = config.learner
    if learner.learning_rate is not None:
        return config
    rate = default_learning_rate("ppo", num_parameters(policy), lora=learner.lora.rank > 0)
    return config.model_copy(update={"learner": learner.model_copy(update={"learning_rate": rate})})


def num_parameters(folder: Path) -> int:
    """Return the number of weights in a model folder. Raises InputError if its files are no safetensors."""
    index = folder / INDEX
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = sorted(path.name for path in folder.glob("model*.safetensors"))
    num = sum(math.prod(shape) for name in names for shape in _shapes(folder / name))
    if not num:
        raise InputError(str(folder), "holds no model*.safetensors")
    return num


def _shapes(path: Path) -> list[list[int]]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header = json.loads(file.read(length))
        return [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
        raise InputError(str(path), "is not a safetensors file") from error
