"""Writes and reads what a learner needs to go on exactly: safetensors and JSON, whole or not at all.

A checkpoint is a folder: `policy/` is an ordinary Hugging Face model folder, `state-*.safetensors` hold the critic and
the optimiser, and `checkpoint.json` says which version this is and which tensor lies in which file. There is no random
state to keep: a step draws nothing but the order of its mini-batches, which is a function of (seed, step, epoch).
Knows neither ranks nor RLlib.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cluster.errors import InputError

FORMAT = 2
INDEX = "checkpoint.json"
POLICY = "policy"
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
)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that takes the place of `path` when the block ends well, synced, and else vanishes."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _sync(partial)
        replaced = path.with_name(f".{path.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
        _sync_one(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_policy(path: Path, model: Any, source: Path) -> None:
    """Write the policy as a Hugging Face folder, with tokenizer and generation config as they are in `source`."""
    with whole_folder(path) as folder:
        _write_policy(folder, model, source)


def _write_policy(folder: Path, model: Any, source: Path) -> None:
    model.save_pretrained(folder)
    for pattern in CARRIED_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def save_checkpoint(
    path: Path,
    *,
    version: int,
    model: Any,
    source: Path,
    tensors: Mapping[str, Tensor],
    extra: Mapping[str, str],
) -> None:
    """Write a checkpoint of `version`; `tensors` are all but the policy's, `extra` text files by their names."""
    with whole_folder(path) as folder:
        (folder / POLICY).mkdir()
        _write_policy(folder / POLICY, model, source)
        files = _write_shards(folder, tensors)
        index = {"format": FORMAT, "version": version, "files": files}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        for name, text in extra.items():
            (folder / name).write_text(text)


def _write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write the tensors into files of bounded size; returns each tensor's file."""
    shards: list[dict[str, Tensor]] = [{}]
    size_bytes = 0
    for name, tensor in tensors.items():
        if size_bytes and size_bytes + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            size_bytes = 0
        size_bytes += tensor.nbytes
        shards[-1][name] = tensor.detach().cpu().contiguous()
    files = {}
    for number, shard in enumerate(shards):
        file = f"state-{number:05d}.safetensors"
        save_file(shard, folder / file)
        files.update(dict.fromkeys(shard, file))
    return files


def load_checkpoint(path: Path) -> tuple[int, dict[str, Tensor]]:
    """The version of a checkpoint and all its tensors but the policy's. Raises InputError where it is not one."""
    try:
        index = json.loads((path / INDEX).read_text())
        version, files = int(index["version"]), dict(index["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(str(path), f"no checkpoint: {error}") from error
    if index.get("format") != FORMAT:
        raise InputError(str(path), f"checkpoint format {index.get('format')}, but this version reads {FORMAT}")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        with safe_open(path / file, framework="pt") as shard:
            tensors |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    if tensors.keys() != files.keys():
        raise InputError(str(path), "its files hold other tensors than its index says")
    return version, tensors


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state by `optimizer.PARAMETER.STATE`, in the names of `model`."""
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Take back what `optimizer_tensors` gave, each tensor to its parameter's device."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameter, _, key = name.removeprefix("optimizer.").rpartition(".")
        if parameter not in parameters:
            raise InputError("learner", f"the checkpoint's optimiser has a parameter {parameter} that the model lacks")
        optimizer.state[parameters[parameter]][key] = tensor.to(parameters[parameter].device)
