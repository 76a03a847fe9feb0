"""Maps the columns of a file to ours: other names, nested columns, and references under the names that others use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from cluster.data.reading.messages import holds_messages, holds_shares

Columns = dict[str, list[Any]]
Held = Literal["text", "messages", "turns", "labels", "others"]
NUM_LOOKED_AT = 200
"""Values of a column that say what it holds."""
MARK = "####"
"""Stands before the result in an answer of GSM8K."""


def held(values: Sequence[Any]) -> Held | None:
    """Return what most of the first values of a column are, or None if there is none."""
    counts: Counter[Held] = Counter()
    for value in values:
        if value is not None and value != []:
            counts[_held_by(value)] += 1
            if counts.total() == NUM_LOOKED_AT:
                break
    ordered = sorted(counts, key=lambda kind: (counts[kind], kind != "others"))
    return ordered[-1] if ordered else None


def _held_by(value: Any) -> Held:
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool):
        return "labels"
    whole = [value] if isinstance(value, Mapping) else value
    if holds_messages(whole):
        return "messages"
    return "turns" if holds_shares(whole) else "others"


def source_of(columns: Mapping[str, Any], name: str) -> str | None:
    """Return the column of a file that holds `name`, which may be nested (`reward_model.ground_truth`), or None."""
    if name in columns:
        return name
    outer = name
    while "." in outer:
        outer = outer.rpartition(".")[0]
        if outer in columns:
            return outer
    return None


def nested(value: Any, path: Sequence[str]) -> Any:
    """Return the value at a path of keys and list positions, or None if there is none."""
    for part in path:
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def renamed(columns: Columns, names: Mapping[str, str]) -> Columns:
    """Return a file's columns under our names; `names` maps ours to the file's, of which some may be nested.

    Other columns keep their names. A column is left out if another column takes its name.
    """
    moved = {theirs: ours for ours, theirs in names.items() if theirs in columns}
    found = {
        moved.get(name, name): values for name, values in columns.items() if name in moved or name not in moved.values()
    }
    for ours, theirs in names.items():
        outer = source_of(columns, theirs)
        if outer is not None and theirs not in columns:
            path = theirs[len(outer) + 1 :].split(".")
            values = [nested(value, path) for value in columns[outer]]
            if any(value is not None for value in values):
                found[ours] = values
    return found


class References(NamedTuple):
    """The references of a data set, and a sentence on where they come from."""

    values: list[Any]
    note: str


def find_references(columns: Columns) -> References | None:
    """Return the references that a data set holds under another name, or None if it has none or its own.

    Looks for verl's `reward_model.ground_truth`, `ground_truth`, the result behind `####` in GSM8K's `answer`, and
    TRL's `solution`.
    """
    if "references" in columns:
        return None
    inner = [nested(value, ["ground_truth"]) for value in columns.get("reward_model", ())]
    if any(value is not None for value in inner):
        return References(inner, "references are reward_model.ground_truth")
    if "ground_truth" in columns:
        return References(columns["ground_truth"], "references are ground_truth")
    answers = columns.get("answer", [])
    if (first := [each for each in answers if each is not None][:NUM_LOOKED_AT]) and all(map(_has_mark, first)):
        return References(list(map(_behind_mark, answers)), f"references are what follows {MARK} in answer")
    return References(columns["solution"], "references are solution") if "solution" in columns else None


def _has_mark(answer: Any) -> bool:
    return isinstance(answer, str) and MARK in answer


def _behind_mark(answer: Any) -> str | None:
    """Return the result of an answer of GSM8K, without separators between thousands."""
    return str(answer).rpartition(MARK)[2].strip().replace(",", "") if _has_mark(answer) else None


def with_types(values: list[Any]) -> list[Any]:
    """Return the values of a column of CSV as numbers if all are whole or decimal numbers as Python writes them."""
    given = [value for value in values if value is not None]
    for kind in (int, float):
        try:
            if given and all(str(kind(value)) == value for value in given):
                return [None if value is None else kind(value) for value in values]
        except ValueError:
            continue
    return values
