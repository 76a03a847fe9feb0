"""Keeps the prompts of a run as they were found to fit, so that a resumed run neither reads nor encodes them again.

A store is used only if data set, tokenizer and settings are the same, by the contents of their files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cluster.compact_rows import CompactRows
from cluster.data.datasets import data_files
from cluster.errors import InputError
from cluster.files import digest_files, replacing_folder
from rollout_actors.prompt_screen import Ready

FORMAT = 1
"""Changes if the rows that are kept change for the same files."""
TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.txt")


def made_of(path: Path, model_path: Path, settings: Mapping[str, Any]) -> str:
    """Return what prompts depend on, as JSON: digests of the data set and the tokenizer, and settings."""
    tokenizer = sorted({file for pattern in TOKENIZER_FILES for file in model_path.glob(pattern)})
    parts = {
        "format": FORMAT,
        "data": digest_files(data_files(path)),
        "tokenizer": digest_files(tokenizer),
        "settings": settings,
    }
    return json.dumps(parts, sort_keys=True, default=str)


def load(folder: Path, made: str) -> Ready | None:
    """Return the prompts that are kept in a folder, memory-mapped, or None if there are none made of this."""
    try:
        found = json.loads((folder / "found.json").read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("made_of") != made:
        return None
    mapped = (np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("rows", "ends"))
    block, ends = map(np.asarray, mapped)
    broken = [InputError(where, what) for where, what in found["broken"]]
    return Ready(CompactRows(block, ends, {}), broken, found["num_readable"])


def save(folder: Path, made: str, ready: Ready) -> None:
    """Keep prompts in a folder, unless some of their rows cannot be written as JSON."""
    if ready.rows.others:
        return
    with replacing_folder(folder) as partial:
        np.save(partial / "rows.npy", ready.rows.block, allow_pickle=False)
        np.save(partial / "ends.npy", ready.rows.ends, allow_pickle=False)
        broken = [(error.where, error.what) for error in ready.broken]
        found = {"made_of": made, "broken": broken, "num_readable": ready.num_readable}
        (partial / "found.json").write_text(json.dumps(found))
