"""Data rows as one block of bytes: 200,000 rows take the memory of their text, also when they are sent to an actor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

Row = dict[str, Any]


class CompactRows(Sequence[Row]):
    """A sequence of rows, each stored as JSON and read when it is needed.

    Rows that JSON does not give back as they are, such as those with dates, are stored as objects. The block can be
    memory-mapped; Ray shares it between the processes of a machine.
    """

    def __init__(self, block: NDArray[np.uint8], ends: NDArray[np.int64], others: Mapping[int, Row]) -> None:
        self.block, self.ends, self.others = block, ends, others

    @classmethod
    def of(cls, rows: Iterable[Row]) -> CompactRows:
        """Store rows, one after the other."""
        block, ends, others = bytearray(), list[int](), dict[int, Row]()
        for number, row in enumerate(rows):
            text = _as_json(row)
            if text is None:
                others[number] = row
            else:
                block += text
            ends.append(len(block))
        return cls(np.frombuffer(bytes(block), np.uint8), np.array(ends, np.int64), others)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        if number in self.others:
            return self.others[number]
        start = int(self.ends[number - 1]) if number else 0
        row: Row = json.loads(self.block[start : int(self.ends[number])].tobytes())
        return row

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def _as_json(row: Row) -> bytes | None:
    """Return the row as JSON, or None if reading it again would give another row."""
    if not _is_plain(row):
        return None
    try:
        return json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if kind is str or kind is int or kind is float or kind is bool or value is None:
        return True
    if kind is dict:
        return all(type(key) is str and _is_plain(each) for key, each in value.items())
    return kind is list and all(map(_is_plain, value))
