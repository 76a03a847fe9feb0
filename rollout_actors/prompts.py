"""Prompts: rows from a Parquet or JSON-lines file, and their text turned into tokens and back.

A row's `prompt` is its text; its other columns travel with it to the scorer. Reading imports no torch, so settings
can be checked at once; the tokenizer is loaded when one is made. Knows neither admission nor engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

from cluster.errors import InputError

_SUFFIXES = (".parquet", ".jsonl")


def read_rows(path: str | Path, required: Sequence[str] = ("prompt",)) -> list[dict[str, Any]]:
    """Every row of a dataset, one dict each.

    Raises InputError naming the file when it is missing, unreadable or empty, and the column or row when a required
    value is.
    """
    path = Path(path)
    rows: list[dict[str, Any]] = _require_columns(path, _read_table(path), required).to_pylist()
    if not rows:
        raise InputError(str(path), "the dataset is empty")
    for index, row in enumerate(rows):
        for column in required:
            if row[column] is None:
                raise InputError(str(path), f"row {index} has no {column!r}")
    return rows


def _read_table(path: Path) -> pa.Table:
    if path.suffix not in _SUFFIXES:
        raise InputError(str(path), f"a dataset is a file ending in {' or '.join(_SUFFIXES)}")
    if not path.is_file():
        raise InputError(str(path), "no such dataset file")
    if not path.stat().st_size:
        raise InputError(str(path), "the dataset is empty")
    try:
        return pyarrow.parquet.read_table(path) if path.suffix == ".parquet" else pyarrow.json.read_json(path)
    except pa.ArrowException as error:
        raise InputError(str(path), f"cannot be read as {path.suffix.removeprefix('.')}: {error}") from error


def _require_columns(path: Path, table: pa.Table, required: Sequence[str]) -> pa.Table:
    for column in required:
        if column not in table.column_names:
            raise InputError(str(path), f"has no column {column!r}; its columns are {', '.join(table.column_names)}")
    return table


class PromptTokenizer:
    """The tokenizer of a model folder: prompts to tokens, responses to text.

    Special tokens are added as the folder's tokenizer adds them (often a beginning-of-sequence token, or none).
    """

    def __init__(self, model_path: str, *, max_prompt_tokens: int) -> None:
        """Raises InputError when the folder has no tokenizer that can be read."""
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise InputError(str(model_path), f"has no usable tokenizer: {error}") from error
        self._max_prompt_tokens = max_prompt_tokens

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Each prompt's token ids [P]. Raises InputError naming a prompt that is empty or too long."""
        encoded: list[list[int]] = self._tokenizer(list(prompts))["input_ids"] if prompts else []
        for prompt, token_ids in zip(prompts, encoded, strict=True):
            if not token_ids:
                raise InputError("data.prompts", f"prompt {prompt!r} has no tokens")
            if len(token_ids) > self._max_prompt_tokens:
                raise InputError(
                    "rollout_actors.max_prompt_tokens",
                    f"prompt {_shortened(prompt)!r} has {len(token_ids)} tokens, more than {self._max_prompt_tokens}",
                )
        return encoded

    def decode(self, responses: Sequence[Sequence[int]]) -> list[str]:
        """The text of each response, special tokens left out and nothing else cleaned up."""
        texts: list[str] = self._tokenizer.batch_decode(
            [list(token_ids) for token_ids in responses], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return texts


def _shortened(prompt: str, max_characters: int = 60) -> str:
    return prompt if len(prompt) <= max_characters else prompt[:max_characters] + "…"


def scorer_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's columns other than its prompt: what the scorer gets beside prompt and response."""
    return {name: value for name, value in row.items() if name != "prompt"}
