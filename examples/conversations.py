"""Write a task's data sets as conversations, in columns that TRL's trainers can read too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

Row = Mapping[str, Any]
T = TypeVar("T")


def user(content: str) -> list[dict[str, str]]:
    """Return a conversation with one user message."""
    return [{"role": "user", "content": content}]


def write_data(
    directory: Path,
    *,
    demonstrations: Iterable[tuple[str, str]],
    training: Sequence[Row],
    held_out: Sequence[Row],
) -> None:
    """Write `sft.parquet` (prompt, completion), `prompts.parquet` and `evaluation.parquet` (prompt and other columns).

    A row's `prompt` is text; demonstrations are pairs of question and answer.
    """
    directory.mkdir(parents=True, exist_ok=True)
    asked, answered = zip(*demonstrations, strict=True)
    completions = [[{"role": "assistant", "content": answer}] for answer in answered]
    sft = pa.table({"prompt": [user(question) for question in asked], "completion": completions})
    pq.write_table(sft, directory / "sft.parquet")
    for name, rows in (("prompts", training), ("evaluation", held_out)):
        table = pa.Table.from_pylist([{**row, "prompt": user(row["prompt"])} for row in rows])
        pq.write_table(table, directory / f"{name}.parquet")


def distinct(make: Callable[[], T], num: int, text: Callable[[T], str]) -> list[T]:
    """Call `make` until there are `num` results with different texts, and return them."""
    found: dict[str, T] = {}
    while len(found) < num:
        made = make()
        found.setdefault(text(made), made)
    return list(found.values())
