"""Turns texts into token ids for sampling, supervised training and reward models.

The caller passes a tokenizer of transformers. Does not import transformers.
"""

from __future__ import annotations

import copy
import functools
import itertools
import secrets
from collections.abc import Sequence
from typing import Any

from cluster.data.chat_template import RenderedPrompt, special_tokens


def token_ids(tokenizer: Any, rendered: Sequence[RenderedPrompt]) -> list[list[int]]:
    """Return the token ids of each rendered text, without adding special tokens. Literals are encoded as text."""
    ids: list[list[int]] = []
    for has_literals, alike in itertools.groupby(rendered, key=lambda text: bool(text.literals)):
        if has_literals:
            ids += [_literal_ids(tokenizer, text, add_special_tokens=False) for text in alike]
        else:
            ids += tokenizer(list(alike), add_special_tokens=False)["input_ids"]
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
    Special tokens that a response spells are text, unless a chat template wrote them or the prompt is empty: then the
    response is a whole text.
    """
    texts = [_with_response(tokenizer, prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    return [[*ids, tokenizer.eos_token_id] for ids in whole_token_ids(tokenizer, texts)]


def _with_response(tokenizer: Any, prompt: str, response: str) -> RenderedPrompt:
    start, literals = len(prompt), prompt.literals if isinstance(prompt, RenderedPrompt) else ()
    if not isinstance(response, RenderedPrompt):
        pattern, text = special_tokens(tokenizer), without_end(response, tokenizer.eos_token)
        response = RenderedPrompt(
            text, [found.span() for found in pattern.finditer(text)] if pattern and prompt else ()
        )
    shifted = [(start + first, start + last) for first, last in response.literals]
    return RenderedPrompt(prompt + response, [*literals, *shifted])


def whole_token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts, either plain or written by a chat template, without an end of sequence."""

    def kind(text: str) -> tuple[bool, bool]:
        literals = text.literals if isinstance(text, RenderedPrompt) else ()
        is_begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        return is_begun and not (literals and literals[0][0] == 0), bool(literals)

    ids: list[list[int]] = []
    for (is_begun, has_literals), alike in itertools.groupby(texts, key=kind):
        if has_literals:
            rendered = [text for text in alike if isinstance(text, RenderedPrompt)]
            ids += [_literal_ids(tokenizer, text, add_special_tokens=not is_begun) for text in rendered]
        elif is_begun:
            ids += tokenizer(list(alike), add_special_tokens=False)["input_ids"]
        else:
            ids += begun_token_ids(tokenizer, list(alike))
    return ids


def without_end(text: str, end: str | None) -> str:
    """Return the text without the end-of-sequence tokens, and the whitespace behind them, that it ends with."""
    while end and (stripped := text.rstrip()).endswith(end):
        text = stripped.removesuffix(end)
    return text


def _literal_ids(tokenizer: Any, text: RenderedPrompt, *, add_special_tokens: bool) -> list[int]:
    """Return the token ids of a text with literals, which never become special tokens."""
    return _literal_tokenizer(tokenizer).encode(text, add_special_tokens=add_special_tokens)


class LiteralTokenizer:
    """Encodes texts in which some spellings of special tokens are text and others are special tokens.

    Works on a copy of the tokenizer that reads all spellings as text. Each special token has an alias there that no
    text can spell, which replaces the spellings that are special tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import AddedToken

        special = {id: token for id, token in tokenizer.added_tokens_decoder.items() if token.special and str(token)}
        self._tokenizer, self._pattern = tokenizer, special_tokens(tokenizer)
        self._special_ids = set(special) - {tokenizer.unk_token_id}
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        nonce = secrets.token_hex(8)
        self._aliases = {str(token): f"\ue000{nonce}-{id}\ue000" for id, token in special.items()}
        self._backend.add_tokens(
            [
                AddedToken(
                    self._aliases[str(token)],
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=False,
                )
                for token in special.values()
            ]
        )
        self._ids = {self._backend.token_to_id(self._aliases[str(token)]): id for id, token in special.items()}

    def encode(self, text: RenderedPrompt, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids; the tokenizer's special tokens are put before the text, none behind it."""
        encoded = self._backend.encode(self._aliased(text), add_special_tokens=add_special_tokens)
        ids, added = list(encoded.ids), encoded.special_tokens_mask
        unknown = self._tokenizer.unk_token_id
        known: list[int | None] = [
            unknown if id in self._special_ids and not is_added else self._ids.get(id, id)
            for id, is_added in zip(ids, added, strict=True)
        ]
        kept = [(id, is_added) for id, is_added in zip(known, added, strict=True) if id is not None]
        return _without_added_end(self._tokenizer, [id for id, _ in kept], [is_added for _, is_added in kept])

    def _aliased(self, text: RenderedPrompt) -> str:
        """Return the text with aliases in place of the special tokens that are not literals."""
        if self._pattern is None:
            return text
        places, pieces = [0, *itertools.chain(*text.literals), len(text)], list[str]()
        for number, (start, end) in enumerate(itertools.pairwise(places)):
            piece = text[start:end]
            pieces.append(piece if number % 2 else self._pattern.sub(lambda found: self._aliases[found[0]], piece))
        return "".join(pieces)


@functools.lru_cache(maxsize=8)
def _literal_tokenizer(tokenizer: Any) -> LiteralTokenizer:
    return LiteralTokenizer(tokenizer)
