"""Reads the prompts of a data set and finds those that are too long, encoding only the ones that may be.

Conversations stay messages: the rollout actor renders each when it is admitted. Imports torch only if a prompt must be
encoded or a conversation rendered.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cluster.compact_rows import CompactRows, Row
from cluster.data.as_messages import as_conversations
from cluster.data.chat_settings import ChatSettings
from cluster.data.datasets import Examples, Reading, read_examples
from cluster.data.invalid_rows import BrokenRows
from cluster.errors import InputError
from rollout_actors.prompts import PromptTokenizer, rows_of
from rollout_actors.token_bound import TokenBound

ROWS_A_CALL = 1000
"""How many prompts are rendered and encoded at a time."""


class Ready(NamedTuple):
    """The rows that may be sampled, the errors of the broken rows that were left out, and how many were not broken."""

    rows: CompactRows
    broken: list[InputError]
    num_readable: int


def ready_rows(
    path: Path,
    model_path: Path,
    *,
    max_prompt_tokens: int | None,
    long_prompts: Literal["error", "drop"] = "error",
    reading: Reading = Reading(),
    may_load: bool = True,
) -> Iterator[Ready]:
    """Yield once: the rows of a data set whose prompts fit. Loads the tokenizer only if it `may_load`.

    Leaves out prompts of more than `max_prompt_tokens`, or raises, as `long_prompts` says; None checks none. Raises
    InputError naming the row of a prompt that is too long, empty or refused by the chat template, or if none is left.
    """
    broken = BrokenRows(reading.broken_rows)
    examples = read_examples(path, "prompts", others=None, columns=reading.columns, broken=broken)
    if ChatSettings.of(model_path).as_messages:
        examples = as_conversations(examples)
    if max_prompt_tokens is None:
        yield Ready(CompactRows.of(rows_of(examples)), broken.errors, len(examples))
        return
    examples, lengths = _Screen(model_path, max_prompt_tokens, may_load).lengths(path, examples, broken)
    for row, length in lengths.items():
        if length > max_prompt_tokens and long_prompts == "error":
            what = f"the prompt of {examples.where(row)} has {length} tokens, more than {max_prompt_tokens}"
            raise InputError("rollout_actors.max_prompt_tokens", what)
    long = {row for row, length in lengths.items() if length > max_prompt_tokens}
    if len(long) == len(examples):
        raise InputError(str(path), f"all {len(examples)} prompts have more than {max_prompt_tokens} tokens")
    fitting = (row for number, row in enumerate(rows_of(examples)) if number not in long)
    yield Ready(CompactRows.of(fitting), broken.errors, len(examples))


def quick_rows(path: Path, model_path: Path, **settings: Any) -> Ready | None:
    """Return what `ready_rows` yields, or None if that needs the tokenizer, whose import takes seconds."""
    try:
        return next(ready_rows(path, model_path, **settings, may_load=False))
    except _TokenizerNeeded:
        return None


def rendered_rows(rows: Sequence[Row], model_path: Path, max_prompt_tokens: int) -> Iterator[list[Row]]:
    """Yield once: the rows with the texts that the chat template makes of their conversations."""
    tokenizer = PromptTokenizer(str(model_path), max_prompt_tokens=max_prompt_tokens)
    yield [tokenizer.ready(row) for row in rows]


class _TokenizerNeeded(Exception):
    """Some prompt must be encoded or rendered, and the tokenizer may not be loaded."""


class _Screen:
    """Finds the lengths of the prompts that may have more than `limit` tokens."""

    def __init__(self, model_path: Path, limit: int, may_load: bool) -> None:
        self._model_path, self._limit, self._may_load = model_path, limit, may_load
        self._bound = TokenBound(model_path)

    @functools.cached_property
    def _tokenizer(self) -> PromptTokenizer:
        if not self._may_load:
            raise _TokenizerNeeded
        return PromptTokenizer(str(self._model_path), max_prompt_tokens=self._limit)

    def lengths(self, path: Path, examples: Examples, broken: BrokenRows) -> tuple[Examples, dict[int, int]]:
        """Return the rows that are not broken, and the numbers of tokens of those that may be too long."""
        if examples.form.conversational:
            self._tokenizer.require_template(path)
            examples, unsure = self._unsure_conversations(examples, broken)
            if not len(examples):
                raise InputError(str(path), f"all {len(broken.errors)} rows are broken; {broken.errors[0]}")
        else:
            prompts = examples.columns["prompt"]
            unsure = [row for row, text in enumerate(prompts) if not text or self._bound.of(text) > self._limit]
        return examples, dict(self._counted(examples, unsure))

    def _counted(self, examples: Examples, rows: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield each of these rows with the number of its prompt's tokens."""
        for first in range(0, len(rows), ROWS_A_CALL):
            part = rows[first : first + ROWS_A_CALL]
            texts = [self._tokenizer.ready(_row(examples, row), examples.where(row))["prompt"] for row in part]
            for row, length in zip(part, self._tokenizer.lengths(texts), strict=True):
                if not length:
                    raise InputError(examples.where(row), "the prompt has no tokens")
                yield row, length

    def _unsure_conversations(self, examples: Examples, broken: BrokenRows) -> tuple[Examples, list[int]]:
        """Return the conversations that the template takes, and which of them may be too long.

        Renders one conversation of each shape: what the template adds to others of the shape is as long.
        """
        kept, unsure, added = list[int](), list[int](), dict[Any, float]()
        for number in range(len(examples)):
            with broken.row():
                row = _row(examples, number)
                shape, texts = _shape(row["prompt"]), json.dumps(row["prompt"])
                if shape not in added:
                    rendered = self._tokenizer.ready(row, examples.where(number))["prompt"]
                    added[shape] = 2 * max(0, len(rendered.encode()) - _num_text_bytes(row["prompt"]))
                if self._bound.of(texts) + added[shape] > self._limit:
                    unsure.append(len(kept))
                kept.append(number)
        return examples if len(kept) == len(examples) else examples.taken(kept), unsure


def _row(examples: Examples, number: int) -> Row:
    return {name: values[number] for name, values in examples.columns.items()}


def _shape(value: Any) -> Any:
    """Return what a template can tell of messages but their texts: keys, roles, types and which texts are empty."""
    if isinstance(value, str):
        return bool(value)
    if isinstance(value, Mapping):
        return tuple((key, each if key == "role" else _shape(each)) for key, each in value.items())
    return tuple(map(_shape, value)) if isinstance(value, list | tuple) else type(value)


def _num_text_bytes(value: Any) -> int:
    """Return the bytes of all texts in messages."""
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, Mapping):
        return sum(_num_text_bytes(each) for key, each in value.items() if key != "role")
    return sum(map(_num_text_bytes, value)) if isinstance(value, list | tuple) else 0
