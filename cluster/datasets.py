"""Data sets as people have them: JSON Lines, Parquet, Hugging Face folders, with TRL's column names.

A data set holds texts or conversations (lists of messages, each with a role and a content). Reads tables and says what
is wrong with them; knows no tokens, and imports neither torch nor ray nor transformers nor datasets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.types as types

from cluster.chat_template import Message
from cluster.errors import InputError

Kind = Literal["sft", "prompts", "preferences"]

FORMS: dict[Kind, tuple[tuple[str, ...], ...]] = {
    "sft": (("prompt", "completion"), ("messages",)),
    "prompts": (("prompt",),),
    "preferences": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
}
"""The columns of each kind's forms, the first that fits is taken; the second ones hold conversations only."""
SUFFIXES = (".parquet", ".jsonl")
JSON_BLOCK_BYTES = 64 * 2**20
"""Longest row of JSON Lines that can be read."""


@dataclass(frozen=True, slots=True)
class Form:
    """In which columns a data set holds its examples, and whether as conversations rather than as texts."""

    columns: tuple[str, ...]
    conversational: bool


def read_schema(path: Path) -> tuple[int, pa.Schema]:
    """Number of rows and the columns, the rows themselves unread. Raises InputError naming the file that is wrong."""
    parts = [_schema(file) for file in data_files(path)]
    try:
        schema = pa.unify_schemas([schema for _, schema in parts], promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(str(path), f"its files hold different columns ({_first_line(error)})") from error
    return sum(num_rows for num_rows, _ in parts), schema


def read_table(path: Path) -> pa.Table:
    """All rows of a data set. Raises InputError naming the file that is wrong, and where there is no row."""
    tables = [_table(file) for file in data_files(path)]
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(str(path), f"its files hold different columns ({_first_line(error)})") from error
    require_rows(path, table.num_rows)
    return table


def require_rows(path: Path, num_rows: int) -> None:
    """Raise InputError where there is none."""
    if not num_rows:
        raise InputError(str(path), "the data set is empty")


def data_files(path: Path) -> list[Path]:
    """The files of a data set, in the order of its rows: the file itself, or those of a folder.

    A folder is what `Dataset.save_to_disk` wrote, with `DatasetDict` its split `train`, or holds shards in the order
    of their names; where shards are named after splits, as on the Hugging Face Hub, those of `train`.
    """
    if path.is_dir():
        return _files_of_folder(path)
    if not path.exists():
        raise InputError(str(path), "no such data set")
    if path.suffix not in SUFFIXES:
        raise InputError(str(path), f"a data set is a folder or ends in {' or '.join(SUFFIXES)}")
    return [path]


def _files_of_folder(folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = _list_in(folder / "dataset_dict.json", "splits")
        if "train" not in splits:
            raise InputError(str(folder), f"has no split 'train', but {', '.join(splits)}: name the folder of one")
        folder = folder / "train"
    if (folder / "state.json").is_file():
        return [folder / Path(file["filename"]).name for file in _list_in(folder / "state.json", "_data_files")]
    shards = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    shards = [file for file in shards if re.match(r"train[-_.]", file.name)] or shards
    if not shards:
        raise InputError(str(folder), "holds neither a saved data set nor *.parquet or *.jsonl")
    if len({file.suffix for file in shards}) > 1:
        raise InputError(str(folder), "holds both *.parquet and *.jsonl: one data set has one of them")
    return shards


def _list_in(path: Path, key: str) -> list[Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))[key]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(str(path), f"not what datasets writes ({error})") from error
    if not isinstance(values, list) or not values:
        raise InputError(str(path), f"names no {key.strip('_')}")
    return values


def _schema(path: Path) -> tuple[int, pa.Schema]:
    try:
        if path.suffix == ".jsonl":
            return _json_lines_schema(path)
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            with pq.ParquetFile(path) as file:
                return file.metadata.num_rows, file.schema_arrow
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as batches:
            return sum(batch.num_rows for batch in batches), batches.schema
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _table(path: Path) -> pa.Table:
    try:
        if path.suffix == ".jsonl":
            return _read_json_lines(path)
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return pq.read_table(path)
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as batches:
            return batches.read_all()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    name = {".parquet": "Parquet", ".jsonl": "JSON Lines"}.get(path.suffix, "an Arrow stream")
    return InputError(str(path), f"not {name} ({_first_line(error)})")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _json_lines_schema(path: Path) -> tuple[int, pa.Schema]:
    """Number of rows of JSON Lines, and the columns of the first."""
    with path.open(encoding="utf-8") as lines:
        first = _first_row(path, lines)
        num_rows = len(first) + sum(1 for line in lines if line.strip())
    return num_rows, pa.Table.from_pylist(first).schema


def _first_row(path: Path, lines: Iterator[str]) -> list[dict[str, Any]]:
    """The next row of JSON Lines, or none at the end. Raises InputError where it is no JSON object."""
    line = next((line for line in lines if line.strip()), None)
    if line is None:
        return []
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(str(path), f"first line is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise InputError(str(path), "first line is not a JSON object")
    return [row]


def _read_json_lines(path: Path) -> pa.Table:
    """A table of JSON Lines. What is text in the first row stays text: Arrow would read a time where it finds one."""
    import pyarrow.json as pj

    with path.open(encoding="utf-8") as lines:
        first = _first_row(path, lines)
    if not first:
        return pa.table({})
    fields = [field for field in pa.Table.from_pylist(first).schema if _is_text_throughout(field.type)]
    return pj.read_json(
        path,
        read_options=pj.ReadOptions(block_size=JSON_BLOCK_BYTES),
        parse_options=pj.ParseOptions(explicit_schema=pa.schema(fields)),
    )


def _is_text_throughout(kind: pa.DataType) -> bool:
    if types.is_list(kind) and types.is_struct(kind.value_type):
        return all(types.is_string(field.type) for field in kind.value_type)
    return bool(types.is_string(kind))


def find_form(path: Path, schema: pa.Schema, kind: Kind) -> Form:
    """The form in which a data set of these columns holds examples of that kind.

    Raises InputError naming the column that is missing, is neither text nor messages, or does not fit the others.
    """
    held = {field.name: _holds(field.type) for field in schema}
    for number, columns in enumerate(FORMS[kind]):
        if all(column in held for column in columns) and (
            number == 0 or all(held[column] == "messages" for column in columns)
        ):
            return Form(columns, _is_conversational(path, columns, held))
    missing = next(column for column in FORMS[kind][0] if column not in held)
    raise InputError(str(path), f"no column {missing!r}; it has {', '.join(held) or 'none'}")


def _is_conversational(path: Path, columns: Sequence[str], held: Mapping[str, str | None]) -> bool:
    for column in columns:
        if held[column] is None:
            raise InputError(str(path), f"column {column!r} is not text, nor messages of role and content")
        if held[column] != held[columns[0]]:
            what = f"column {columns[0]!r} holds {held[columns[0]]}, but {column!r} {held[column]}: both the same, or"
            raise InputError(str(path), f"{what} no {columns[0]!r} where the messages begin with it")
    return held[columns[0]] == "messages"


def _holds(kind: pa.DataType) -> str | None:
    """What a column of that type holds: "text", "messages" or neither."""
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "text"
    if types.is_list(kind) or types.is_large_list(kind) or types.is_list_view(kind):
        fields = {field.name for field in kind.value_type} if types.is_struct(kind.value_type) else set()
        return "messages" if {"role", "content"} <= fields else None
    return None


def read_columns(path: Path, kind: Kind, *, others: Sequence[str] | None = ()) -> tuple[Form, dict[str, list[Any]]]:
    """A data set's form and its columns by name, those of the form checked row by row: texts, or lists of messages.

    Of the other columns those in `others` are read, where there are such, and all of them where it is None. Raises
    InputError naming the file, and the column or row, where something is missing, empty or of another type.
    """
    table = read_table(path)
    form = find_form(path, table.schema, kind)
    names = [name for name in table.column_names if others is None or name in form.columns or name in others]
    columns: dict[str, list[Any]] = {name: table.column(name).to_pylist() for name in names}
    for column in form.columns:
        check = _checked_messages if form.conversational else _checked_text
        columns[column] = [check(path, column, row, value) for row, value in enumerate(columns[column])]
    return form, columns


def _checked_text(path: Path, column: str, row: int, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(str(path), f"column {column!r}, row {row}: not text but {value!r}")
    return value


def _checked_messages(path: Path, column: str, row: int, value: Any) -> list[Message]:
    """The messages of one row, without the keys that only others have and Arrow has filled up with null."""
    where = f"column {column!r}, row {row}"
    if not value:
        raise InputError(str(path), f"{where}: no messages")
    messages = [{key: part for key, part in (message or {}).items() if part is not None} for message in value]
    for message in messages:
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise InputError(str(path), f"{where}: a message without {key} as text")
    return messages
