"""Read data sets of many formats under TRL's column names.

A data set holds texts or conversations (lists of messages, each with a role and a content). Errors name file and line.
Imports neither torch nor ray nor transformers nor datasets.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cluster.data.invalid_rows import BrokenRows, RowLocations
from cluster.data.reading.columns import Columns, find_references, renamed, with_types
from cluster.data.reading.data_files import data_files
from cluster.data.reading.forms import FORMS, PAIR, Form, Kind, Recipe, find_recipe, label_of
from cluster.data.reading.messages import checked_messages, checked_tools
from cluster.data.reading.raw_rows import RawRows, read_raw, read_sample
from cluster.errors import InputError

__all__ = ["FORMS", "PAIR", "Examples", "Form", "Kind", "Reading", "Source", "data_files", "describe", "read_examples"]


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
    """The valid rows of a data set, by columns; `numbers` are their positions among the readable rows.

    `notes` say how columns were understood that are not named like ours.
    """

    form: Form
    columns: dict[str, list[Any]]
    numbers: Sequence[int]
    places: RowLocations
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.numbers)

    def where(self, index: int) -> str:
        """Return file and line of a row."""
        return self.places.of(self.numbers[index])

    def taken(self, indices: Sequence[int]) -> Examples:
        """Return these rows only."""
        columns = {name: [values[i] for i in indices] for name, values in self.columns.items()}
        return Examples(self.form, columns, [self.numbers[i] for i in indices], self.places, self.notes)


@dataclass(frozen=True, slots=True)
class Description:
    """A data set seen from its first rows: number of rows, form, our names of its columns, and notes on them.

    `first` is the first text of its form, or an empty text.
    """

    num_rows: int
    form: Form
    columns: tuple[str, ...]
    notes: tuple[str, ...]
    first: str = ""


def describe(path: Path, kind: Kind, columns: Mapping[str, str] | None = None) -> Description:
    """Describe a data set from its first rows. Raises InputError naming a wrong file or column."""
    num_rows, raw = read_sample(path)
    require_rows(path, num_rows)
    found, notes = _named(raw, columns or {}, kind)
    recipe = find_recipe(path, found, kind)
    return Description(num_rows, recipe.form, tuple(found), _notes(recipe, notes), _first_text(found, recipe, raw))


def _first_text(found: Columns, recipe: Recipe, raw: RawRows) -> str:
    """Return the text in the first column of the first row that fits the form, or an empty text."""
    broken = BrokenRows("skip")
    for row in range(len(raw)):
        with broken.row():
            own = {name: found[name][row] for name in recipe.taken}
            value = _made(recipe, own, raw.places.of(row))[recipe.form.columns[0]]
            return value if isinstance(value, str) else ""
    return ""


def column_names(path: Path, columns: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Return our names of the columns that the first rows of a data set have."""
    return tuple(renamed(read_sample(path)[1].columns, columns or {}))


def require_rows(path: Path, num_rows: int) -> None:
    """Raise InputError if the data set is empty."""
    if not num_rows:
        raise InputError(str(path), "the data set is empty")


def _require_whole_rows(path: Path, num: int, broken: BrokenRows) -> None:
    if not num and broken.errors:
        raise InputError(str(path), f"all {len(broken.errors)} rows are broken; {broken.errors[0]}")
    require_rows(path, num)


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

    Also reads the columns in `others` that exist, or every column if it is None, but those of bytes. `columns` maps
    our column names to the file's. Rows with a label become pairs if `paired`. Raises InputError naming the file, and
    the column or row, if a value is missing, empty or of another type, unless `broken` skips invalid rows.
    """
    broken = broken or BrokenRows()
    raw = read_raw(path, broken)
    _require_whole_rows(path, len(raw), broken)
    found, notes = _named(raw, columns or {}, kind)
    recipe = find_recipe(path, found, kind)
    names = [name for name in found if name not in raw.binary and (others is None or name in others)]
    checked = _checked(found, names, recipe, raw, broken, _notes(recipe, notes))
    _require_whole_rows(path, len(checked), broken)
    return _paired(checked, path, broken) if paired and "label" in recipe.form.columns else checked


def _notes(recipe: Recipe, others: Sequence[str]) -> tuple[str, ...]:
    return tuple(note for note in (recipe.form.note, *others) if note)


def _named(raw: RawRows, names: Mapping[str, str], kind: Kind) -> tuple[Columns, list[str]]:
    """Return the columns under our names, with the references of prompts, and notes on what was found."""
    found, notes = renamed(raw.columns, names), list[str]()
    if kind == "prompts" and (references := find_references(found)) is not None:
        found["references"] = references.values
        notes.append(references.note)
    if kind == "prompts" and raw.binary:
        notes.append(f"columns of bytes are left out: {', '.join(raw.binary)}")
    return found, notes


def _checked(
    found: Columns, others: Sequence[str], recipe: Recipe, raw: RawRows, broken: BrokenRows, notes: tuple[str, ...]
) -> Examples:
    """Return the rows that the recipe accepts, with its columns and others."""
    form, kept = recipe.form, list[int]()
    made: Columns = {name: [] for name in form.columns}
    if "tools" in others:
        found = found | {"tools": list(found["tools"])}
    for row in range(len(raw)):
        with broken.row():
            where = raw.places.of(row)
            values = _made(recipe, {name: found[name][row] for name in recipe.taken}, where)
            if "tools" in others:
                found["tools"][row] = checked_tools(found["tools"][row], where)
            for name in form.columns:
                made[name].append(values[name])
            kept.append(row)
    rest = {name: with_types(found[name]) if raw.untyped else found[name] for name in others if name not in made}
    if len(kept) < len(raw):
        rest = {name: [values[row] for row in kept] for name, values in rest.items()}
    order = dict.fromkeys([*(name for name in found if name in made or name in rest), *made])
    return Examples(form, {name: made[name] if name in made else rest[name] for name in order}, kept, raw.places, notes)


def _made(recipe: Recipe, row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a row's columns of the form. Raises InputError at `where` if one has another type."""
    form, values = recipe.form, recipe.make(row, where) if recipe.make else row
    return {name: _checked_value(form, name, values[name], where) for name in form.columns}


def _checked_value(form: Form, column: str, value: Any, where: str) -> Any:
    if column == "label":
        label = label_of(value)
        if label is None:
            raise InputError(where, f"column 'label': expected true or false, got {value!r}")
        return label
    if form.conversational:
        return checked_messages(value, column, where)
    if not isinstance(value, str):
        raise InputError(where, f"column {column!r}: expected text, got {value!r:.80}")
    return value


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
    form = Form(PAIR, examples.form.conversational, examples.form.note)
    broken.num_unpaired += len(examples) - 2 * len(pairs)
    return Examples(form, columns, taken.numbers, taken.places, taken.notes)
