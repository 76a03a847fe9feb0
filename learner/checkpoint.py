"""Writes and reads checkpoints, atomically, from which a learner resumes exactly.

A checkpoint is a folder of safetensors and JSON. `state-*.safetensors` hold the trained tensors and the optimiser, each
rank's rows in separate files. `checkpoint.json` holds the version and the location of each tensor's rows, so that any
number of ranks can read them. `policy/` is an ordinary Hugging Face model folder of the policy. No random state is
saved: a step draws only the order of its mini-batches, which depends on (seed, step, epoch).
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from cluster import files
from cluster.data.chat_settings import SETTINGS_FILE
from cluster.errors import InputError
from learner.distributed.ranks import Ranks
from learner.distributed.sharding import first_row, local

FORMAT = 3
INDEX = "checkpoint.json"
POLICY = "policy"
OPTIMIZER = "optimizer."
MAX_SHARD_BYTES = 4 * 2**30
CARRIED_FILES = (
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.*",
    SETTINGS_FILE,
)


def write_policy(folder: Path, config: Any, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Write a Hugging Face model folder of these tensors, with the tokenizer of `source`."""
    write_model(folder, AutoModelForCausalLM, config, tensors)
    for pattern in CARRIED_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def write_model(folder: Path, auto_class: Any, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """Write weights and configuration of a Hugging Face model with these tensors."""
    dtype = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=dtype)
    model.save_pretrained(folder, state_dict=dict(tensors))


@contextmanager
def shared_folder(path: Path, ranks: Ranks) -> Iterator[Path]:
    """Yield a folder that all ranks may write into.

    It replaces `path` if no rank raises, as in `files.replacing_folder`.
    """
    partial = files.partial_of(path)
    with ranks.agreed():
        if ranks.rank == 0:
            files.start_folder(path)
    try:
        yield partial
        with ranks.agreed():
            if ranks.rank == 0:
                files.finish_folder(partial, path)
    finally:
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)


class Rows(NamedTuple):
    """This rank's part of a tensor: its rows from `first` on, or, if `is_whole`, the whole tensor."""

    tensor: Tensor
    first: int
    is_whole: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Rows:
        """Return the rows of an ordinary or a sharded tensor."""
        here = local(tensor)
        return cls(here, first_row(tensor), here is tensor)


def write_state(folder: Path, tensors: Mapping[str, Tensor | Rows], ranks: Ranks) -> None:
    """Write this rank's rows of the tensors into files of bounded size.

    The first rank writes whole tensors.

    A file's header holds the index of each tensor's first row.
    """
    parts = {name: tensor if isinstance(tensor, Rows) else Rows.of(tensor) for name, tensor in tensors.items()}
    shards: list[dict[str, Tensor]] = [{}]
    size_bytes = 0
    for name, (rows, _, is_whole) in parts.items():
        if ranks.rank > 0 and (is_whole or rows.numel() == 0):
            continue
        if size_bytes and size_bytes + rows.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            size_bytes = 0
        size_bytes += rows.nbytes
        shards[-1][name] = rows.detach().cpu().contiguous()
    for number, shard in enumerate(filter(None, shards)):
        starts = {name: parts[name].first for name in shard}
        file = folder / f"state-{ranks.rank:05d}-{number:05d}.safetensors"
        save_file(shard, file, metadata={"first_rows": json.dumps(starts, sort_keys=True)})


def write_index(folder: Path, version: int) -> None:
    """Write the version of the folder's state and the location of each tensor's rows."""
    parts: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for file in sorted(folder.glob("state-*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name, start in json.loads(shard.metadata()["first_rows"]).items():
                parts[name].append((start, file.name))
    index = {"format": FORMAT, "version": version, "tensors": {name: sorted(rows) for name, rows in parts.items()}}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


class State:
    """Reads the state of a checkpoint. Raises InputError if the folder is not a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            index = json.loads((path / INDEX).read_text())
            self.version = int(index["version"])
            if index["format"] != FORMAT:
                raise InputError(str(path), f"checkpoint format {index['format']}, but this version reads {FORMAT}")
            self._parts = {name: [(int(row), str(file)) for row, file in p] for name, p in index["tensors"].items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(str(path), f"no checkpoint: {error}") from error

    @property
    def names(self) -> set[str]:
        """The names of the stored tensors."""
        return set(self._parts)

    def read(self, name: str) -> Tensor:
        """Read a whole tensor."""
        rows = []
        for _, file in self._locations(name):
            with safe_open(self.path / file, framework="pt") as shard:
                rows.append(shard.get_tensor(name))
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def fill(self, name: str, target: Tensor) -> None:
        """Read this rank's rows into `target`. Raises InputError if the shapes differ."""
        here = local(target)
        if here.ndim == 0:
            here.copy_(self.read(name))
            return
        start, stop, num = first_row(target), first_row(target) + len(here), 0
        for first, file in self._locations(name):
            with safe_open(self.path / file, framework="pt") as shard:
                stored = shard.get_slice(name)
                shape = stored.get_shape()
                if list(shape[1:]) != list(target.shape[1:]):
                    raise InputError(str(self.path), f"{name} is {shape}, but the model's is {list(target.shape)}")
                a, b = max(start, first), min(stop, first + shape[0])
                if a < b:
                    here[a - start : b - start].copy_(stored[a - first : b - first])
                    num += b - a
        if num != len(here):
            raise InputError(str(self.path), f"{name} has {num} of the {len(here)} rows that the model has here")

    def _locations(self, name: str) -> list[tuple[int, str]]:
        if name not in self._parts:
            raise InputError(str(self.path), f"has no {name}: it was made with other settings")
        return self._parts[name]


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the optimiser's state by `optimizer.PARAMETER.STATE`, with parameter names of `model`."""
    return {
        f"{OPTIMIZER}{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore(state: State, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Restore `trained_tensors` and `optimizer_tensors`, saved with any number of ranks."""
    with torch.no_grad():
        for name, parameter in trained_tensors(model).items():
            state.fill(name, parameter)
            prefix = f"{OPTIMIZER}{name}."
            for key in sorted(stored for stored in state.names if stored.startswith(prefix)):
                value = torch.zeros(()) if key == f"{prefix}step" else torch.zeros_like(parameter)
                state.fill(key, value)
                optimizer.state[parameter][key.removeprefix(prefix)] = value
    trained = trained_tensors(model)
    unknown = [
        name for name in state.names if name.startswith(("policy.", "critic.", "value_head.")) and name not in trained
    ]
    if unknown:
        raise InputError(str(state.path), f"has {min(unknown)}, which is not trained here: another model made it")
