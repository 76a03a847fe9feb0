"""Finds the files of a data set and opens them: their formats, compressions and splits."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import pyarrow as pa

from cluster.errors import InputError

FileKind = Literal["parquet", "arrow", "jsonl", "json", "csv"]
KINDS: dict[str, FileKind] = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
}
"""Suffix of a file -> how it is read."""
NAMES: dict[FileKind, str] = {
    "parquet": "Parquet",
    "arrow": "an Arrow stream",
    "jsonl": "JSON Lines",
    "json": "JSON",
    "csv": "CSV",
}
SUFFIXES = ".parquet, .jsonl, .json, .csv or .tsv, the last four also with .gz, .zst, .bz2 or .xz"
METADATA = re.compile(r"(dataset_infos?|dataset_dict|state|README)\.json")
"""Files of the package datasets and of the Hub that hold no rows."""
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)
"""Errors of a file that cannot be decompressed."""


def _open_zstd(path: Path) -> BinaryIO:
    return io.BytesIO(pa.input_stream(str(path), compression="zstd").read())


OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zstd,
}
"""Suffix of a compression -> the function that opens a file for reading its decompressed content."""


class FileFormat(NamedTuple):
    """How a file is read: its kind, and the suffix of its compression or an empty text."""

    kind: FileKind
    compression: str = ""


def format_of(path: Path) -> FileFormat | None:
    """Return the format that a file's suffixes name, or None if it is none of a data set."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compression = suffixes.pop() if suffixes and suffixes[-1] in OPENERS else ""
    kind = KINDS.get(suffixes[-1]) if suffixes else None
    if kind is None or (compression and kind in ("parquet", "arrow")):
        return None
    return FileFormat(kind, compression)


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading its decompressed bytes."""
    form = format_of(path)
    opener = OPENERS.get(form.compression) if form else None
    opened: BinaryIO = opener(path) if opener else path.open("rb")
    return opened


def data_files(path: Path) -> list[Path]:
    """Return the files of a data set, in the order of its rows: the file itself, or those of a folder.

    A folder is the output of `Dataset.save_to_disk` (of a `DatasetDict`, the split `train`) or holds shards, read in
    the order of their names. If shards are named after splits, as on the Hugging Face Hub, only `train` is read.
    """
    if path.is_dir():
        return _files_of_folder(path)
    if not path.exists():
        raise InputError(str(path), "no such data set")
    if format_of(path) is None:
        raise InputError(str(path), f"a data set is a folder or ends in {SUFFIXES}")
    return [path]


def _files_of_folder(folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = _list_in(folder / "dataset_dict.json", "splits")
        if "train" not in splits:
            raise InputError(str(folder), f"has no split 'train', only {', '.join(splits)}: name the folder of one")
        folder = folder / "train"
    if (folder / "state.json").is_file():
        return [folder / Path(file["filename"]).name for file in _list_in(folder / "state.json", "_data_files")]
    shards = _shards(folder) or (_shards(folder / "data") if (folder / "data").is_dir() else [])
    shards = [file for file in shards if re.match(r"train[-_.]", file.name)] or shards
    if not shards:
        raise InputError(str(folder), "holds neither a saved data set nor files that end in " + SUFFIXES)
    kinds = sorted({NAMES[form.kind] for file in shards if (form := format_of(file))})
    if len(kinds) > 1:
        raise InputError(str(folder), f"holds files of {' and '.join(kinds)}: one data set has one kind of file")
    return shards


def _shards(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and format_of(file) and not METADATA.fullmatch(file.name) and not file.name.startswith(".")
    )


def _list_in(path: Path, key: str) -> list[Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))[key]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(str(path), f"is not in the format that datasets writes ({error})") from error
    if not isinstance(values, list) or not values:
        raise InputError(str(path), f"names no {key.strip('_')}")
    return values
