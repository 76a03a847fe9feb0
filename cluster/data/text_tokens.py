"""Turns texts into token ids for sampling, supervised training and reward models.

The caller passes a tokenizer of transformers. Does not import transformers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from cluster.data.chat_template import RenderedPrompt


def token_ids(tokenizer: Any, rendered: Sequence[RenderedPrompt]) -> list[list[int]]:
    """Return the token ids of each rendered text, without adding special tokens."""
    ids: list[list[int]] = tokenizer(list(rendered), add_special_tokens=False)["input_ids"] if rendered else []
    return ids


def begun_token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each plain text with the special tokens that the tokenizer puts before a text.

    Leaves out those that it puts behind a text: the text is continued.
    """
    if not texts:
        return []
    encoded = tokenizer(list(texts), return_special_tokens_mask=True)
    return [
        _without_added_end(tokenizer, ids, added)
        for ids, added in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    ]


def _without_added_end(tokenizer: Any, ids: list[int], added: Sequence[int]) -> list[int]:
    if 0 not in added:
        return ids[: ids[:1] == [tokenizer.bos_token_id]]
    num_added = next(num for num, is_added in enumerate(reversed(added)) if not is_added)
    return ids[: len(ids) - num_added]


def scored_token_ids(tokenizer: Any, prompts: Sequence[str], responses: Sequence[str]) -> list[list[int]]:
    """Return the token ids of prompt, response and one end of sequence, as a reward model is trained and asked.

    The tokenizer puts its special tokens before the text, unless the text starts with one, as chat templates write it.
    """
    texts = [p + without_end(r, tokenizer.eos_token) for p, r in zip(prompts, responses, strict=True)]
    return [[*ids, tokenizer.eos_token_id] for ids in whole_token_ids(tokenizer, texts)]


def whole_token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts, either plain or written by a chat template, without an end of sequence."""

    def is_begun(text: str) -> bool:
        return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)

    ids: list[list[int]] = []
    for begun, alike in itertools.groupby(texts, key=is_begun):
        if begun:
            ids += tokenizer(list(alike), add_special_tokens=False)["input_ids"]
        else:
            ids += begun_token_ids(tokenizer, list(alike))
    return ids


def without_end(text: str, end: str | None) -> str:
    """Return the text without the end-of-sequence tokens, and the whitespace behind them, that it ends with."""
    while end and (stripped := text.rstrip()).endswith(end):
        text = stripped.removesuffix(end)
    return text
