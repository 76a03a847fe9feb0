"""Parse names of the Hub: ``Qwen/Qwen3-0.6B@main`` for a model, ``openai/gsm8k:main/train`` for a data set.

A name is pinned if its revision is a full commit hash; the settings that a run records hold pinned names only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cluster.errors import InputError

RepoKind = Literal["model", "dataset"]

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_NAME = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[^:@\s]+))?(?::(?P<config>[^/:]+?)(?:/(?P<split>[^/:]+))?)?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILES = (".parquet", ".jsonl", ".json", ".csv", ".gz", ".bz2", ".zst", ".xz", ".safetensors", ".toml")
"""Endings that a local file has and a repository's name does not."""


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository of the Hub at a revision; for a data set also its configuration and split.

    `text` is the name as it was written; errors quote it.
    """

    text: str
    kind: RepoKind
    repo: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None

    @property
    def commit(self) -> str | None:
        """The full commit hash if the name is pinned."""
        return self.revision if self.revision and _COMMIT.fullmatch(self.revision) else None

    def at(self, commit: str) -> HubName:
        """Return the name pinned to a commit."""
        part = self.text.partition(":")[2]
        text = f"{self.repo}@{commit}" + (f":{part}" if part else "")
        return replace(self, text=text, revision=commit)


def hub_name(path: Path, kind: RepoKind) -> HubName | None:
    """Return the name that `path` is, or None if it is a local path.

    A path that exists, is absolute, ends like a file or begins with the name of an existing folder is local. A data
    set's name ends with ``:SPLIT`` or ``:CONFIG/SPLIT``; without it the split is `train`. Raises InputError if a
    model's name has such an ending.
    """
    found = _NAME.fullmatch(str(path))
    if found is None or path.exists() or path.suffix in _FILES or Path(path.parts[0]).is_dir():
        return None
    config, split = found["config"], found["split"]
    if kind == "model" and config:
        raise InputError(str(path), "a model's name has no configuration or split: write OWNER/NAME@REVISION")
    if kind == "dataset" and split is None:
        config, split = None, config or "train"
    return HubName(str(path), kind, found["repo"], found["revision"], config, split)
