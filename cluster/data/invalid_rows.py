"""Handle rows of a data set that cannot be read: locate them, and raise the first error or skip them all."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

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
    """Locates the readable rows of a data set: by line in text files, by row counted from 0 in files of columns.

    `owners` has each row's file as its number in `files`, `lines` its line or row there.
    """

    def __init__(self, files: Sequence[Path], owners: array[int], lines: array[int], counts_rows: bool) -> None:
        self._files, self._owners, self._lines = files, owners, lines
        self._unit = "row" if counts_rows else "line"

    def __len__(self) -> int:
        return len(self._lines)

    def of(self, number: int) -> str:
        """Return file and line of a row by its number among the readable rows."""
        return f"{self._files[self._owners[number]]}, {self._unit} {self._lines[number]}"
