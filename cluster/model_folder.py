"""Find and check the files of a Hugging Face model folder, the same ones for engine, learner and reward service.

Reads JSON and the headers of safetensors files, never a tensor. Imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import InputError
from cluster.files import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
PICKLES = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
SETTINGS = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", "chat_templates/*.jinja")
"""Files of a model folder, besides the weights, from which the model and its tokenizer are made."""
MAX_HEADER_BYTES = 100 * 2**20
"""Longest header of a safetensors file, as the format's own reader limits it."""
LFS_POINTER = b"version https://git-lfs"
CONVERSION = (
    'python -c "from transformers import {model} as M, AutoTokenizer as T; '
    "[c.from_pretrained('{folder}').save_pretrained('{folder}-safetensors') for c in (M, T)]\""
)
MERGING = (
    'python -c "from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer as T; '
    "M.from_pretrained('{folder}').merge_and_unload().save_pretrained('{folder}-merged'); "
    "T.from_pretrained('{base}').save_pretrained('{folder}-merged')\""
)


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a model's weights: `model.safetensors`, or the shards that the index names.

    Ignores other weights in the folder, such as Mistral's `consolidated.safetensors`. Raises InputError naming a
    missing shard, and if the weights are in another format or under other names.
    """
    single, index = folder / WEIGHTS, folder / INDEX
    if index.is_file():
        shards = _shards(index)
        if single.is_file() and single not in shards:
            what = f"has both {WEIGHTS} and the shards of {INDEX}, which may differ: remove one of the two"
            raise InputError(str(folder), what)
        if missing := [shard for shard in shards if not shard.is_file()]:
            what = f"missing, as are {len(missing) - 1} more" if len(missing) > 1 else "missing"
            raise InputError(str(missing[0]), f"{what}: {INDEX} names it (download the model again)")
        return shards
    if single.is_file():
        return [single]
    raise _without_weights(folder)


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise InputError(str(index), "is not an index of safetensors: its weight_map names no files")
    return [index.with_name(name) for name in sorted(names)]


def _without_weights(folder: Path) -> InputError:
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        what = f"has neither {WEIGHTS} nor {INDEX}, only {', '.join(others[:3])}"
        return InputError(str(folder), f"{what}: use a folder in the format of transformers")
    pickled = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickled:
        what = f"its weights are in {pickled[0]}, a format that can run code when loaded; convert them once"
        return InputError(str(folder), f"{what}: {CONVERSION.format(folder=folder, model=_auto_class(folder))}")
    return InputError(str(folder), "no *.safetensors in the model folder")


def _auto_class(folder: Path) -> str:
    settings = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    name, *_ = settings.get("architectures") or [""]
    is_classifier = str(name).endswith("ForSequenceClassification")
    return "AutoModelForSequenceClassification" if is_classifier else "AutoModelForCausalLM"


def other_weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder that are not the model's weights."""
    own = set(weight_files(folder))
    return [path for path in sorted(folder.glob("*.safetensors")) if path not in own]


def model_files(folder: Path) -> list[Path]:
    """Return all files from which a model and its tokenizer are made, weights included, in the order of their names."""
    found = {path for pattern in SETTINGS for path in folder.glob(pattern) if path.is_file()}
    return sorted(found.union(weight_files(folder)))


def require_no_adapter(folder: Path) -> None:
    """Raise InputError, with the command that merges, if the folder holds an adapter (PEFT) of another model."""
    if not (folder / ADAPTER).is_file():
        return
    base = read_json(folder / ADAPTER).get("base_model_name_or_path") or "BASE"
    what = f"holds an adapter for {base}; merge the two once and use the merged folder"
    raise InputError(str(folder), f"{what}: {MERGING.format(folder=folder, base=base)}")


def text_settings(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config.json that describes the language model."""
    text = settings.get("text_config")
    return text if isinstance(text, Mapping) else settings


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model, from the headers of its weight files.

    Raises InputError naming a file that is no safetensors file or is cut off, or a tensor that the index names and no
    file holds.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        shapes |= _shapes_of(file)
    index = folder / INDEX
    named = read_json(index)["weight_map"] if index.is_file() else {}
    if missing := [name for name in named if name not in shapes]:
        raise InputError(str(folder / named[missing[0]]), f"does not hold {missing[0]}, which {INDEX} says it does")
    return shapes


def _shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = file.read(8)
        if LFS_POINTER.startswith(begin) and begin:
            raise InputError(str(path), "is a pointer of Git LFS, not the weights: run `git lfs pull` in its folder")
        length = struct.unpack("<Q", begin)[0] if len(begin) == 8 else 0
        if not 0 < length <= min(size, MAX_HEADER_BYTES):
            raise InputError(str(path), "is not a safetensors file, or it is cut off (download it again)")
        try:
            header = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
            shapes = {name: tuple(map(int, entry["shape"])) for name, entry in tensors.items()}
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise InputError(str(path), f"is not a safetensors file ({error})") from error
    if size < 8 + length + end:
        what = f"has {size:,} bytes of {8 + length + end:,}: it is cut off (download it again)"
        raise InputError(str(path), what)
    return shapes
