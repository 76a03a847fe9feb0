"""Reads the rows of files as they are: every row of a text file has its own keys, at any depth.

Text files are parsed row by row and never as a table, which would give every row the keys of all the others.
"""

from __future__ import annotations

import csv
import io
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from cluster.data.invalid_rows import BrokenRows, RowLocations
from cluster.data.reading.arrow_values import holds_bytes, plain_values
from cluster.data.reading.data_files import DAMAGED, NAMES, FileKind, data_files, format_of, open_file
from cluster.data.unicode_text import is_unicode
from cluster.errors import InputError, first_line

SAMPLE = 100
"""Rows from which the form of a data set is recognised without reading it whole."""
UNREADABLE = (*DAMAGED, UnicodeDecodeError, AttributeError, TypeError)
"""Errors of a file whose content does not match its suffix; the last two come from unknown Arrow extension types."""


@dataclass(slots=True)
class RawRows:
    """Rows by column, None where a row lacks one, with their locations.

    `untyped` are the columns of CSV, whose values are texts; `binary` the columns that hold bytes.
    """

    columns: dict[str, list[Any]]
    places: RowLocations
    untyped: bool = False
    binary: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.places)


class _Parsed(NamedTuple):
    """A row of a text file with its line."""

    line: int
    row: dict[str, Any]


@dataclass(slots=True)
class _Builder:
    """Collects the rows of a data set's files by column."""

    columns: dict[str, list[Any]] = field(default_factory=dict)
    num: int = 0

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; other columns get None."""
        for name, values in self.columns.items():
            values.append(row.get(name))
        for name, value in row.items():
            if name not in self.columns:
                self.columns[name] = [*[None] * self.num, value]
        self.num += 1

    def extend(self, columns: dict[str, list[Any]], num: int) -> None:
        """Append rows that are given by column."""
        for name in columns:
            self.columns.setdefault(name, [None] * self.num)
        for name, values in self.columns.items():
            values += columns.get(name, [None] * num)
        self.num += num


def read_raw(path: Path, broken: BrokenRows) -> RawRows:
    """Return the readable rows of a data set. Raises InputError naming a wrong file."""
    return _read(path, data_files(path), broken, limit=None)


def read_sample(path: Path) -> tuple[int, RawRows]:
    """Return the number of rows of a data set, and its first readable ones with the names of all columns."""
    files, num = data_files(path), 0
    sample = _read(path, files, BrokenRows("skip"), limit=SAMPLE)
    for file in files:
        num += _count(file)
    return num, sample


def _read(path: Path, files: Sequence[Path], broken: BrokenRows, *, limit: int | None) -> RawRows:
    found, lines, owners = _Builder(), array("Q"), array("L")
    binary: dict[str, None] = {}
    kinds = {form.kind for file in files if (form := format_of(file))} or {"arrow"}
    for number, file in enumerate(files):
        num_before = found.num
        if limit is not None and num_before >= limit:
            break
        for start in _add_rows(file, found, binary, broken, None if limit is None else limit - num_before):
            lines.append(start)
        owners.extend([number] * (found.num - num_before))
    counted = kinds <= {"parquet", "arrow"}
    return RawRows(found.columns, RowLocations(files, owners, lines, counted), "csv" in kinds, tuple(binary))


def _add_rows(
    file: Path, found: _Builder, binary: dict[str, None], broken: BrokenRows, limit: int | None
) -> Iterator[int]:
    """Add the rows of a file; yields the line of each, or its number in a file of columns."""
    kind = _kind_of(file)
    try:
        if kind in ("parquet", "arrow"):
            num_before = found.num
            _add_table(_table(file, kind, limit), found, binary)
            yield from range(found.num - num_before)
            return
        parsed = _PARSERS[kind](file, broken)
        for number, (line, row) in enumerate(parsed):
            if number == limit:
                return
            found.add(row)
            yield line
    except UNREADABLE as error:
        raise InputError(str(file), f"not {NAMES[kind]} ({first_line(error)})") from error


def _kind_of(file: Path) -> FileKind:
    form = format_of(file)
    return form.kind if form else "arrow"


def _table(file: Path, kind: FileKind, limit: int | None) -> pa.Table:
    """Return the rows of a file of columns, or its first ones."""
    if kind == "parquet":
        import pyarrow.parquet as pq

        if limit is None:
            return pq.read_table(file)
        with pq.ParquetFile(file) as source:
            batches = source.iter_batches(batch_size=limit)
            first = next(batches, None)
            return source.schema_arrow.empty_table() if first is None else pa.Table.from_batches([first])
    with pa.memory_map(str(file)) as mapped:
        try:
            with pa.ipc.open_stream(mapped) as stream:
                table = stream.read_all()
        except pa.ArrowInvalid:
            mapped.seek(0)
            table = pa.ipc.open_file(mapped).read_all()
    return table if limit is None else table.slice(0, limit)


def _add_table(table: pa.Table, found: _Builder, binary: dict[str, None]) -> None:
    columns = {}
    for field_, column in zip(table.schema, table.columns, strict=True):
        if holds_bytes(field_.type):
            binary[field_.name] = None
        columns[field_.name] = plain_values(column, field_)
    found.extend(columns, table.num_rows)


def _count(file: Path) -> int:
    """Return the number of rows of a file, without reading them if possible."""
    kind = _kind_of(file)
    try:
        if kind == "parquet":
            import pyarrow.parquet as pq

            return int(pq.read_metadata(file).num_rows)
        if kind == "arrow":
            return int(_table(file, kind, None).num_rows)
        if kind == "jsonl":
            with open_file(file) as lines:
                return sum(1 for line in lines if line.strip())
        broken = BrokenRows("skip")
        return sum(1 for _ in _PARSERS[kind](file, broken)) + len(broken.errors)
    except UNREADABLE as error:
        raise InputError(str(file), f"not {NAMES[kind]} ({first_line(error)})") from error


def _json_lines(file: Path, broken: BrokenRows) -> Iterator[_Parsed]:
    with open_file(file) as source:
        yield from _lines_of_json(file, source, broken)


def _lines_of_json(file: Path, source: Any, broken: BrokenRows) -> Iterator[_Parsed]:
    for number, line in enumerate(source, 1):
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not text.strip():
            continue
        with broken.row():
            yield _Parsed(number, _parsed_object(text.strip(), f"{file}, line {number}"))


def _parsed_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(where, f"not JSON in UTF-8 ({error})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(where, f"not JSON ({error})") from error
    return _checked_object(row, where, may_escape=b"\\u" in line)


def _checked_object(row: Any, where: str, *, may_escape: bool) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(where, "not a JSON object")
    if may_escape and not is_unicode(json.dumps(row, ensure_ascii=False)):
        raise InputError(where, "not Unicode: a text holds a lone surrogate (an escape from \\ud800 to \\udfff)")
    return row


def _json(file: Path, broken: BrokenRows) -> Iterator[_Parsed]:
    """Yield the rows of a JSON list, of an object that has one list of rows, or of JSON Lines in a .json file."""
    with open_file(file) as source:
        content = source.read()
    content = content.removeprefix(b"\xef\xbb\xbf")
    start = content[: len(content) - len(content.lstrip()) + 1].lstrip()
    if start == b"[":
        yield from _listed(file, content.decode("utf-8"), broken)
        return
    try:
        whole = json.loads(content) if content.strip() else {}
    except (ValueError, RecursionError):
        yield from _lines_of_json(file, io.BytesIO(content), broken)
        return
    lists = [value for value in whole.values() if isinstance(value, list)] if isinstance(whole, dict) else []
    if isinstance(whole, dict) and len(whole) == len(lists) == 1 and all(isinstance(row, dict) for row in lists[0]):
        yield from (_Parsed(number, row) for number, row in enumerate(lists[0]))
    elif content.strip():
        held = f"one object with {', '.join(map(repr, list(whole)[:6]))}" if isinstance(whole, dict) else "no object"
        raise InputError(str(file), f"a JSON data set is a list of objects or one object a line; this is {held}")


def _listed(file: Path, text: str, broken: BrokenRows) -> Iterator[_Parsed]:
    """Yield the objects of a JSON list one by one, so that an error names its line."""
    decoder, place, line = json.JSONDecoder(), text.index("[") + 1, 1 + text.count("\n", 0, text.index("["))
    separators = " \t\r\n"
    while True:
        begin = place
        while place < len(text) and text[place] in separators + ",":
            place += 1
        line += text.count("\n", begin, place)
        where = f"{file}, line {line}"
        if text[place : place + 1] == "]":
            return
        try:
            row, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            found = InputError(where, f"not JSON from here on, so no later row is read ({error})")
            with broken.row():
                raise found from error
            return
        with broken.row():
            yield _Parsed(line, _checked_object(row, where, may_escape="\\u" in text[place:end]))
        line += text.count("\n", place, end)
        place = end


def _csv(file: Path, broken: BrokenRows) -> Iterator[_Parsed]:
    """Yield the rows of CSV; every value is text, or None if the cell is empty."""
    csv.field_size_limit(2**31 - 1)
    with (
        open_file(file) as source,
        io.TextIOWrapper(source, encoding="utf-8-sig", errors="surrogateescape", newline="") as text,
    ):
        first = text.readline()
        reader = csv.reader(_from(first, text), delimiter=_delimiter(file, first), strict=True)
        names = next(reader, [])
        if len(set(names)) < len(names) or not all(names):
            raise InputError(str(file), f"its first line must name each column once, and names {', '.join(names)}")
        while True:
            line = reader.line_num + 1
            with broken.row():
                cells = _next_cells(reader, f"{file}, line {line}")
                if cells is None:
                    return
                if cells:
                    yield _Parsed(line, _row_of_cells(names, cells, f"{file}, line {line}"))


def _from(first: str, rest: Any) -> Iterator[str]:
    yield first
    yield from rest


def _delimiter(file: Path, header: str) -> str:
    """Return the character between cells: a tab or semicolon if the first line has it and no comma."""
    if ".tsv" in (suffix.lower() for suffix in file.suffixes):
        return "\t"
    return next((mark for mark in "\t;" if mark in header and "," not in header), ",")


def _next_cells(reader: Any, where: str) -> list[str] | None:
    try:
        cells: list[str] | None = next(reader, None)
    except csv.Error as error:
        raise InputError(where, f"not CSV ({error})") from error
    return cells


def _row_of_cells(names: Sequence[str], cells: Sequence[str], where: str) -> dict[str, Any]:
    if len(cells) != len(names):
        raise InputError(where, f"{len(cells)} values, but {len(names)} columns")
    if not is_unicode("".join(cells)):
        raise InputError(where, "not CSV in UTF-8")
    return {name: cell or None for name, cell in zip(names, cells, strict=True)}


_PARSERS: dict[str, Callable[[Path, BrokenRows], Iterator[_Parsed]]] = {
    "jsonl": _json_lines,
    "json": _json,
    "csv": _csv,
}
