"""Read data sets: JSON Lines, Parquet and Hugging Face folders, with TRL's column names.

A data set holds texts or conversations (lists of messages, each with a role and a content). Errors name file and line.
Imports neither torch nor ray nor transformers nor datasets.
"""

from __future__ import annotations

import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.types as types

from cluster.data.chat_template import Message
from cluster.data.invalid_rows import BrokenRows, RowLocations, first_row, rows_alike
from cluster.errors import InputError, first_line

Kind = Literal["sft", "prompts", "preferences"]

FORMS: dict[Kind, tuple[tuple[str, ...], ...]] = {
    "sft": (("prompt", "completion"), ("messages",)),
    "prompts": (("prompt",),),
    "preferences": (("prompt", "chosen", "rejected"), ("chosen", "rejected"), ("prompt", "completion", "label")),
}
"""The columns of each kind's forms; the first that fits is used. Forms without a prompt hold only conversations."""
PAIR = FORMS["preferences"][0]
SUFFIXES = (".parquet", ".jsonl")
JSON_BLOCK_BYTES = 64 * 2**20
"""Length of the longest row of JSON Lines that can be read."""
UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError, AttributeError, TypeError)
"""Errors of a file whose content does not match its suffix; the last two come from unknown Arrow extension types."""


@dataclass(frozen=True, slots=True)
class Form:
    """The columns that hold a data set's examples, and whether they are conversations or texts."""

    columns: tuple[str, ...]
    conversational: bool


@dataclass(frozen=True, slots=True)
class Reading:
    """How a run reads its data sets: our column names -> the file's, and the handling of broken rows."""

    columns: Mapping[str, str] = field(default_factory=dict)
    broken_rows: Literal["error", "skip"] = "error"


class Source(NamedTuple):
    """A data set that is mixed with others, and its weight among them."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Examples:
    """The valid rows of a data set, by columns; `numbers` are their positions among all rows."""

    form: Form
    columns: dict[str, list[Any]]
    numbers: Sequence[int]
    places: RowLocations

    def __len__(self) -> int:
        return len(self.numbers)

    def where(self, index: int) -> str:
        """Return file and line of a row."""
        return self.places.of(self.numbers[index])

    def taken(self, indices: Sequence[int]) -> Examples:
        """Return these rows only."""
        columns = {name: [values[i] for i in indices] for name, values in self.columns.items()}
        return Examples(self.form, columns, [self.numbers[i] for i in indices], self.places)


def read_schema(path: Path) -> tuple[int, pa.Schema]:
    """Return the number of rows and the columns without reading the rows. Raises InputError naming a wrong file."""
    parts = [_schema(file) for file in data_files(path)]
    try:
        schema = pa.unify_schemas([schema for _, schema in parts], promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(str(path), f"its files hold different columns ({first_line(error)})") from error
    return sum(num_rows for num_rows, _ in parts), schema


def read_table(path: Path) -> pa.Table:
    """Return all rows of a data set. Raises InputError naming a wrong file, or if there is no row."""
    return _read_rows(path, BrokenRows())[0]


def _read_rows(path: Path, broken: BrokenRows) -> tuple[pa.Table, list[int]]:
    """Return the readable rows and their numbers among all rows."""
    tables, numbers, num_rows = [], list[int](), 0
    for file in data_files(path):
        table, kept, num = _table(file, broken)
        tables.append(table)
        numbers += [num_rows + number for number in kept]
        num_rows += num
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(str(path), f"its files hold different columns ({first_line(error)})") from error
    _require_whole_rows(path, table.num_rows, broken)
    return table, numbers


def _require_whole_rows(path: Path, num: int, broken: BrokenRows) -> None:
    if not num and broken.errors:
        raise InputError(str(path), f"all {len(broken.errors)} rows are broken; {broken.errors[0]}")
    require_rows(path, num)


def require_rows(path: Path, num_rows: int) -> None:
    """Raise InputError if the data set is empty."""
    if not num_rows:
        raise InputError(str(path), "the data set is empty")


def data_files(path: Path) -> list[Path]:
    """Return the files of a data set, in the order of its rows: the file itself, or those of a folder.

    A folder is the output of `Dataset.save_to_disk` (of a `DatasetDict`, the split `train`) or holds shards, read in
    the order of their names. If shards are named after splits, as on the Hugging Face Hub, only `train` is read.
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
            raise InputError(str(folder), f"has no split 'train', only {', '.join(splits)}: name the folder of one")
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
        raise InputError(str(path), f"is not in the format that datasets writes ({error})") from error
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
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


def _table(path: Path, broken: BrokenRows) -> tuple[pa.Table, Iterable[int], int]:
    """Return the readable rows of a file, the number of each in it, and how many rows it has in all."""
    try:
        if path.suffix == ".jsonl":
            return _read_json_lines(path, broken)
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            table = pq.read_table(path)
        else:
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as batches:
                table = batches.read_all()
    except UNREADABLE as error:
        raise _unreadable(path, error) from error
    return table, range(table.num_rows), table.num_rows


def _unreadable(path: Path, error: Exception) -> InputError:
    name = {".parquet": "Parquet", ".jsonl": "JSON Lines"}.get(path.suffix, "an Arrow stream")
    return InputError(str(path), f"not {name} ({first_line(error)})")


def _json_lines_schema(path: Path) -> tuple[int, pa.Schema]:
    """Return the number of rows of JSON Lines, and the columns of the first valid row."""
    first = first_row(path)
    with path.open("rb") as lines:
        num_rows = sum(1 for line in lines if line.strip())
    return num_rows, pa.Table.from_pylist([first] if first else []).schema


def _read_json_lines(path: Path, broken: BrokenRows) -> tuple[pa.Table, Iterable[int], int]:
    """Read JSON Lines as a table. A column that is text in the first row stays text, even if it looks like a time.

    Arrow reads the whole file; only if that fails is it read line by line.
    """
    try:
        table = _parsed(path, first_row(path))
        return table, range(table.num_rows), table.num_rows
    except (pa.ArrowException, InputError):
        num_before = len(broken.errors)
        numbers, rows = rows_alike(path, broken)
        text = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        return (
            _parsed(io.BytesIO(text), next(iter(rows), None)),
            numbers,
            len(numbers) + len(broken.errors) - num_before,
        )


def _parsed(source: Path | io.BytesIO, first: Mapping[str, Any] | None) -> pa.Table:
    """Read JSON Lines with Arrow, text columns as in the first row. Returns an empty table if there is no row."""
    import pyarrow.json as pj

    if first is None:
        return pa.table({})
    fields = [field for field in pa.Table.from_pylist([first]).schema if _is_text_throughout(field.type)]
    return pj.read_json(
        source,
        read_options=pj.ReadOptions(block_size=JSON_BLOCK_BYTES),
        parse_options=pj.ParseOptions(explicit_schema=pa.schema(fields)),
    )


def _is_text_throughout(kind: pa.DataType) -> bool:
    if types.is_list(kind) and types.is_struct(kind.value_type):
        return all(types.is_string(field.type) for field in kind.value_type)
    return bool(types.is_string(kind))


def find_form(path: Path, schema: pa.Schema, kind: Kind) -> Form:
    """Return the form in which a data set with these columns holds examples of a kind.

    Raises InputError naming the column that is missing, is neither text nor messages, or does not fit the others.
    """
    held = {field.name: _holds(field.type) for field in schema}
    for columns in FORMS[kind]:
        if all(column in held for column in columns) and (
            "prompt" in columns or all(held[column] == "messages" for column in columns)
        ):
            return Form(columns, _is_conversational(path, columns, held))
    missing = next(column for column in FORMS[kind][0] if column not in held)
    raise InputError(str(path), f"no column {missing!r}; it has {', '.join(held) or 'none'}")


def _is_conversational(path: Path, columns: Sequence[str], held: Mapping[str, str | None]) -> bool:
    for column in columns:
        if column == "label":
            if held[column] != "labels":
                raise InputError(str(path), "column 'label' does not hold true or false")
            continue
        if held[column] not in ("text", "messages"):
            raise InputError(str(path), f"column {column!r} holds neither text nor messages of role and content")
        if held[column] != held[columns[0]]:
            what = f"column {columns[0]!r} holds {held[columns[0]]}, but {column!r} holds {held[column]}: use one kind"
            raise InputError(str(path), f"{what}, or leave out {columns[0]!r} if the messages include it")
    return held[columns[0]] == "messages"


def _holds(kind: pa.DataType) -> str | None:
    """Return what a column of that type holds: "text", "messages", "labels" or None."""
    if types.is_boolean(kind):
        return "labels"
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "text"
    if types.is_list(kind) or types.is_large_list(kind) or types.is_list_view(kind):
        fields = {field.name for field in kind.value_type} if types.is_struct(kind.value_type) else set()
        return "messages" if {"role", "content"} <= fields else None
    return None


def own_names(names: Sequence[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Map a file's column names to ours; `columns` maps ours to the file's. Other columns keep their names.

    A column is left out if another column takes its name.
    """
    ours = {there: here for here, there in columns.items() if there in names}
    return {name: ours.get(name, name) for name in names if name in ours or name not in ours.values()}


def read_examples(
    path: Path,
    kind: Kind,
    *,
    others: Sequence[str] | None = (),
    columns: Mapping[str, str] | None = None,
    broken: BrokenRows | None = None,
    paired: bool = True,
) -> Examples:
    """Read a data set and check the columns of its form in every row: texts, or lists of messages.

    Also reads the columns in `others` that exist, or every column if it is None. `columns` maps our column names to
    the file's. Rows with a label become pairs if `paired`. Raises InputError naming the file, and the column or row, if
    a value is missing, empty or of another type, unless `broken` skips invalid rows.
    """
    broken = broken or BrokenRows()
    table, numbers = _read_rows(path, broken)
    named = own_names(table.column_names, columns or {})
    table = table.select(list(named)).rename_columns(list(named.values()))
    form = find_form(path, table.schema, kind)
    names = [name for name in table.column_names if others is None or name in form.columns or name in others]
    read = Examples(
        form, {name: table.column(name).to_pylist() for name in names}, numbers, RowLocations(data_files(path))
    )
    checked = _checked(read, broken)
    _require_whole_rows(path, len(checked), broken)
    return _paired(checked, path, broken) if paired and "label" in form.columns else checked


def _checked(examples: Examples, broken: BrokenRows) -> Examples:
    """Return the rows whose columns have the types of the form."""
    kept = []
    for row in range(len(examples)):
        with broken.row():
            for column in examples.form.columns:
                values = examples.columns[column]
                values[row] = _checked_value(examples, column, row, values[row])
            kept.append(row)
    return examples if len(kept) == len(examples) else examples.taken(kept)


def _checked_value(examples: Examples, column: str, row: int, value: Any) -> Any:
    if column == "label":
        if not isinstance(value, bool):
            raise InputError(examples.where(row), f"column 'label': expected true or false, got {value!r}")
        return value
    if examples.form.conversational:
        return _checked_messages(examples, column, row, value)
    if not isinstance(value, str):
        raise InputError(examples.where(row), f"column {column!r}: expected text, got {value!r}")
    return value


def _checked_messages(examples: Examples, column: str, row: int, value: Any) -> list[Message]:
    """Return the messages of one row, without the null keys that Arrow adds if other messages have them."""
    if not value:
        raise InputError(examples.where(row), f"column {column!r}: no messages")
    messages = [{key: part for key, part in (message or {}).items() if part is not None} for message in value]
    for message in messages:
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise InputError(examples.where(row), f"column {column!r}: a message without {key} as text")
    return messages


def _paired(examples: Examples, path: Path, broken: BrokenRows) -> Examples:
    """Turn rows of prompt, completion and label (TRL's unpaired preferences) into pairs.

    For each prompt, the first row labelled true is paired with the first labelled false, the second with the second,
    and so on. Each row is in one pair at most; the unpaired rows are counted. Raises InputError if no prompt has both.
    """
    rows: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for row, (prompt, label) in enumerate(zip(examples.columns["prompt"], examples.columns["label"], strict=True)):
        rows[json.dumps(prompt, sort_keys=True)][0 if label else 1].append(row)
    pairs = [pair for good, bad in rows.values() for pair in zip(good, bad, strict=False)]
    if not pairs:
        raise InputError(str(path), "no prompt has both a completion labelled true and one labelled false")
    taken = examples.taken([good for good, _ in pairs])
    completions = examples.columns["completion"]
    columns = {name: values for name, values in taken.columns.items() if name not in ("completion", "label")}
    columns |= {"chosen": taken.columns["completion"], "rejected": [completions[bad] for _, bad in pairs]}
    form = Form(PAIR, examples.form.conversational)
    broken.num_unpaired += len(examples) - 2 * len(pairs)
    return Examples(form, columns, taken.numbers, taken.places)
