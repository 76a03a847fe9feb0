"""Reads prompts and converts between text and tokens.

A row's `prompt` is a text or a conversation; its other columns are passed to the scorer. Reading imports no torch, so
settings can be checked quickly; the tokenizer is loaded by `PromptTokenizer`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.data.chat_settings import end_ids
from cluster.data.chat_template import RenderedPrompt, render, require_template
from cluster.data.datasets import Examples, Reading, read_examples
from cluster.data.invalid_rows import BrokenRows
from cluster.data.text_tokens import as_text, begun_token_ids, continued_token_ids, token_ids
from cluster.data.tokenizer import load_tokenizer
from cluster.data.tool_calls import require_tools_written, with_objects
from cluster.data.unicode_text import is_unicode
from cluster.errors import InputError
from rollout_actors.response_text import ResponseText

Row = dict[str, Any]
PROMPTS = "data.prompts"


def read_rows(path: str | Path, reading: Reading = Reading(), broken: BrokenRows | None = None) -> list[Row]:
    """Return every row of a data set as a dict. Its `prompt` is a text or a list of messages.

    Raises InputError naming the file if it is missing, unreadable or empty, and the column or row if a prompt is;
    `broken` may leave out such rows.
    """
    return list(rows_of(read_examples(Path(path), "prompts", others=None, columns=reading.columns, broken=broken)))


def rows_of(examples: Examples) -> Iterator[Row]:
    """Yield the rows of examples as dicts."""
    columns = examples.columns
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def holds_messages(rows: Sequence[Row]) -> bool:
    """Return whether the prompts are conversations, which need a tokenizer to become texts."""
    return not isinstance(rows[0]["prompt"], str)


class PromptTokenizer:
    """The tokenizer of a model folder: converts prompts to tokens and responses to text.

    Adds the special tokens that the folder's tokenizer puts before a text (often a beginning-of-sequence token, or
    none), but none that it puts behind a text, which the model continues.
    """

    def __init__(
        self,
        model_path: str,
        *,
        max_prompt_tokens: int,
        keep_special_tokens: bool | Sequence[str] = True,
        stop: Sequence[str] = (),
    ) -> None:
        """Raises InputError if the folder has no readable tokenizer."""
        self._tokenizer = load_tokenizer(Path(model_path))
        added = self._tokenizer.added_tokens_decoder
        self._special_texts = {id: str(token) for id, token in added.items() if token.special}
        self._max_prompt_tokens = max_prompt_tokens
        self._stop = tuple(stop)
        self.end_ids = end_ids(Path(model_path), self._tokenizer)
        """The tokens that end a response: the tokenizer's end of sequence and those of generation_config.json."""
        self._response_text = ResponseText(self._tokenizer, self.end_ids, keep_special_tokens)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers."""
        return self._tokenizer

    def encode_part(self, text: str) -> list[int]:
        """Return the token ids of a text inside a conversation, without adding special tokens."""
        (ids,) = continued_token_ids(self._tokenizer, [as_text(self._tokenizer, text)])
        return ids

    def special_text(self, token_id: int) -> str:
        """Return the text of a special token, or an empty text for other tokens."""
        return self._special_texts.get(token_id, "")

    def require_template(self, path: Path) -> None:
        """Raise InputError naming the data set and the model folder if there is no chat template."""
        require_template(self._tokenizer, str(path))

    def ready(self, row: Mapping[str, Any], where: str = PROMPTS) -> Row:
        """Return the row with its conversation formatted as a text, up to the start of the model's turn.

        Raises InputError at `where` if the chat template refuses the conversation, or if there is none.
        """
        prompt = row["prompt"]
        if isinstance(prompt, str):
            return dict(row)
        require_template(self._tokenizer, where)
        tools = row.get("tools") or ()
        require_tools_written(self._tokenizer, prompt, tools, where)
        messages = with_objects(self._tokenizer, prompt)
        return {**row, "prompt": render(self._tokenizer, messages, where, is_prompt=True, tools=tools)}

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each prompt."""
        return [len(ids) for ids in self._token_ids(prompts)]

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return each prompt's token ids [P]. Raises InputError naming a prompt that is empty or too long."""
        encoded = self._token_ids(prompts)
        for prompt, ids in zip(prompts, encoded, strict=True):
            if not ids:
                raise InputError(PROMPTS, f"prompt {prompt!r} has no tokens")
            if len(ids) > self._max_prompt_tokens:
                raise InputError(
                    "rollout_actors.max_prompt_tokens",
                    f"prompt {_shortened(prompt)!r} has {len(ids)} tokens, more than {self._max_prompt_tokens}",
                )
        return encoded

    def _token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        for prompt in prompts:
            if not is_unicode(prompt):
                raise InputError(
                    "data.prompts", f"prompt {_shortened(prompt)!r} is not Unicode: it has a lone surrogate"
                )
        encoded: list[list[int]] = []
        for rendered, alike in itertools.groupby(prompts, key=lambda prompt: isinstance(prompt, RenderedPrompt)):
            batch: list[Any] = list(alike)
            encoded += (token_ids if rendered else begun_token_ids)(self._tokenizer, batch)
        return encoded

    def decode(self, responses: Sequence[Sequence[int]], contexts: Sequence[Sequence[int]] | None = None) -> list[str]:
        """Return the text of each response behind its context, the tokens before it, as `keep_special_tokens` says.

        A text ends before its stop text.
        """
        before = contexts if contexts is not None else [()] * len(responses)
        texts = [self._response_text.decode(ids, given) for ids, given in zip(responses, before, strict=True)]
        return [before_stop(text, self._stop) for text in texts]


def before_stop(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop text."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    if not places:
        return text
    return text.part(0, min(places)) if isinstance(text, RenderedPrompt) else text[: min(places)]


def _shortened(prompt: str, max_characters: int = 60) -> str:
    return prompt if len(prompt) <= max_characters else prompt[:max_characters] + "…"


def scorer_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row's columns except the prompt, as they are passed to the scorer."""
    return {name: value for name, value in row.items() if name != "prompt"}
