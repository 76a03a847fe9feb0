"""Write files and folders whole or not at all, on the disk when the call returns; read JSON; digest files.

Every writer of a file that others read goes through `replacing` or `replacing_folder`. The content is written beside
its place, under `.NAME.partial`, and renamed once it is complete: readers see the earlier content or the new one.
One process at a time may write a path. What a killed process left is deleted by the next write of the same path.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.errors import InputError


@contextmanager
def replacing(path: Path, *, mode: int = 0o666) -> Iterator[Path]:
    """Yield the path of an empty file to write; it replaces `path`, synced, if the block raises nothing.

    The file is created with `mode` (less the umask). If the block raises, `path` is unchanged and the new file is
    deleted. The folder of `path` must exist.

        with replacing(folder / "answers.parquet") as partial:
            pq.write_table(table, partial)
    """
    partial = partial_of(path)
    partial.unlink(missing_ok=True)
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT, mode))
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; it replaces the folder `path`, synced, if the block raises nothing.

    If the block raises, `path` is unchanged and the new folder is deleted. Parent folders are created.
    """
    partial = start_folder(path)
    try:
        yield partial
        finish_folder(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_of(path: Path) -> Path:
    """Return the path under which the next content of `path` is written."""
    return path.with_name(f".{path.name}.partial")


def start_folder(path: Path) -> Path:
    """Create the empty folder that `finish_folder` renames to `path`; for writers that cannot use `replacing_folder`.

    Restores an earlier `path` if a process was killed between the two renames of `finish_folder`.
    """
    partial, replaced = partial_of(path), _replaced(path)
    if replaced.exists() and not path.exists():
        replaced.rename(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def finish_folder(partial: Path, path: Path) -> None:
    """Sync everything in `partial`, rename it to `path`, then delete the folder that `path` was before, if any."""
    for inner in [*partial.rglob("*"), partial]:
        if not inner.is_symlink():
            _sync(inner)
    replaced = _replaced(path)
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        path.rename(replaced)
    partial.rename(path)
    sync_folder(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text` in UTF-8, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, *, mode: int = 0o666) -> None:
    """Replace a file by `content` as indented JSON, whole or not at all; numbers that JSON cannot hold become null."""
    with replacing(path, mode=mode) as partial:
        text = json.dumps(without_non_finite(content), indent=2, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")


def without_non_finite(value: Any) -> Any:
    """Return the value with None in place of NaN and infinities, which JSON cannot hold, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_non_finite(each) for key, each in value.items()}
    return [without_non_finite(each) for each in value] if isinstance(value, list | tuple) else value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises InputError, which names the file, if it is missing or not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(str(path), "missing") from error
    except ValueError as error:
        raise InputError(str(path), f"not JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(str(path), "not a JSON object")
    return content


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder, so that new and renamed files survive a power failure."""
    _sync(folder)


def digest_files(paths: Sequence[Path]) -> str:
    """Return the first 12 hexadecimal digits of sha256 over the files' bytes, in the given order."""
    return sha256_of_files(paths)[:12]


def sha256_of_files(paths: Sequence[Path]) -> str:
    """Return sha256 over the files' bytes, in the given order, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")
