"""Handle rows of a data set that cannot be read: locate them, and raise the first error or skip them all."""

from __future__ import annotations

import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cluster.data.unicode_text import is_unicode
from cluster.errors import InputError


class BrokenRows:
    """Raises the error of an invalid row, or with "skip" collects it in `errors`.

    `num_unpaired` counts labelled rows without a row of the other label for the same prompt.
    """

    def __init__(self, rule: Literal["error", "skip"] = "error") -> None:
        self._rule = rule
        self.errors: list[InputError] = []
        self.num_unpaired = 0

    @contextlib.contextmanager
    def row(self) -> Iterator[None]:
        """Process one row in the block. An InputError ends the block; it is raised unless broken rows are skipped."""
        try:
            yield
        except InputError as error:
            if self._rule == "error":
                raise
            self.errors.append(error)


class RowLocations:
    """Locates rows in the files of a data set: by line in JSON Lines, by row counted from 0 in other files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._lines: dict[Path, list[int]] = {}
        self._num_rows: dict[Path, int] = {}

    def of(self, number: int) -> str:
        """Return file and line of a row by its number among all rows; reads the files."""
        for file in self._files:
            if file.suffix == ".jsonl":
                lines = self._lines.setdefault(file, []) or _numbered(file, self._lines[file])
                if number < len(lines):
                    return f"{file}, line {lines[number]}"
                number -= len(lines)
            else:
                num_rows = self._rows_of(file)
                if number < num_rows or len(self._files) == 1:
                    return f"{file}, row {number}"
                number -= num_rows
        raise IndexError(number)

    def _rows_of(self, file: Path) -> int:
        if file not in self._num_rows:
            self._num_rows[file] = _num_rows(file)
        return self._num_rows[file]


def _numbered(file: Path, lines: list[int]) -> list[int]:
    """Return the numbers, from 1, of the non-blank lines."""
    with file.open("rb") as source:
        lines += [number for number, line in enumerate(source, 1) if line.strip()]
    return lines


def _num_rows(file: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.suffix == ".parquet":
        return int(pq.read_metadata(file).num_rows)
    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as batches:
        return sum(batch.num_rows for batch in batches)


def first_row(file: Path) -> dict[str, Any] | None:
    """Return the first valid row of JSON Lines. Raises InputError naming the first line if none is."""
    broken = BrokenRows("skip")
    found = next((row for _, _, row in _rows(file, broken)), None)
    if found is None and broken.errors:
        raise broken.errors[0]
    return found


def rows_alike(file: Path, broken: BrokenRows) -> tuple[list[int], list[dict[str, Any]]]:
    """Return the numbers and contents of the rows whose columns have the type (text, messages) that most rows have.

    Rows are numbered from 0; blank lines do not count.
    """
    rows = list(_rows(file, broken))
    kinds = _kinds([row for _, _, row in rows])
    numbers, alike = [], []
    for number, line_number, row in rows:
        with broken.row():
            _require_kinds(row, kinds, f"{file}, line {line_number}")
            numbers.append(number)
            alike.append(row)
    return numbers, alike


def _rows(file: Path, broken: BrokenRows) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield number, line and content of each row that is a JSON object."""
    number = -1
    with file.open("rb") as source:
        for line_number, line in enumerate(source, 1):
            if not line.strip():
                continue
            number += 1
            row = None
            with broken.row():
                row = _row(line.strip(), f"{file}, line {line_number}")
            if row is not None:
                yield number, line_number, row


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(where, f"not JSON ({error})") from error
    if not isinstance(row, dict):
        raise InputError(where, "not a JSON object")
    if b"\\u" in line and not is_unicode(json.dumps(row, ensure_ascii=False)):
        raise InputError(where, "not Unicode: a text holds a lone surrogate (an escape from \\ud800 to \\udfff)")
    return row


def _kinds(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the columns that hold mostly text or mostly messages, with that kind."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for column, value in row.items():
            if value is not None:
                found[column][_kind(value)] += 1
    most = {column: max(counts, key=lambda kind: (counts[kind], kind)) for column, counts in found.items()}
    return {column: kind for column, kind in most.items() if kind != "others"}


def _kind(value: Any) -> str:
    """Return "text", "messages" or "others"."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in value
    ):
        return "messages" if value else "others"
    return "others"


def _require_kinds(row: Mapping[str, Any], kinds: Mapping[str, str], where: str) -> None:
    for column, kind in kinds.items():
        value = row.get(column)
        if value not in (None, []) and _kind(value) != kind:
            wanted = "text" if kind == "text" else "messages of role and content"
            raise InputError(where, f"column {column!r}: expected {wanted}, got {value!r:.80}")
