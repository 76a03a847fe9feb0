"""Turns texts into token ids for sampling, supervised training and reward models.

Control tokens that a plain text spells are text, unless the model's chat settings allow them. The caller passes a
tokenizer of transformers. Does not import transformers.
"""

from __future__ import annotations

import functools
import itertools
import json
import secrets
from collections.abc import Sequence
from typing import Any

from cluster.data.chat_settings import settings_of
from cluster.data.control_tokens import RenderedPrompt, answer_spellings, control_spellings, is_control

ANCHORS = ("\n", ".", "a", "0")
"""Texts of which one is put before a text that continues another, so that the tokenizer adds no space to it."""


def token_ids(tokenizer: Any, rendered: Sequence[RenderedPrompt]) -> list[list[int]]:
    """Return the token ids of each rendered text, without adding special tokens. Literals are encoded as text."""
    ids: list[list[int]] = []
    for has_literals, alike in itertools.groupby(rendered, key=lambda text: bool(text.literals)):
        if has_literals:
            ids += [_literal_ids(tokenizer, text, add_special_tokens=False) for text in alike]
        else:
            ids += tokenizer(list(alike), add_special_tokens=False)["input_ids"]
    return ids


def as_text(tokenizer: Any, text: str, *, is_answer: bool = False) -> RenderedPrompt:
    """Return a plain text with the control tokens that it spells as literals, unless the chat settings allow them.

    An answer of the model may spell its own words (thoughts, calls). A rendered text is returned as it is.
    """
    if isinstance(text, RenderedPrompt):
        return text
    spellings = (answer_spellings if is_answer else control_spellings)(tokenizer)
    return RenderedPrompt(text, () if settings_of(tokenizer).allow_special_tokens else spellings.spans(text))


def begun_token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each plain text with the special tokens that the tokenizer puts before a text.

    Leaves out those that it puts behind a text: the text is continued.
    """
    ids: list[list[int]] = []
    plain = (as_text(tokenizer, text) for text in texts)
    for has_literals, alike in itertools.groupby(plain, key=lambda text: bool(text.literals)):
        if has_literals:
            ids += [_literal_ids(tokenizer, text, add_special_tokens=True) for text in alike]
        else:
            ids += _begun(tokenizer, list(alike))
    return ids


def _begun(tokenizer: Any, texts: list[RenderedPrompt]) -> list[list[int]]:
    encoded = tokenizer(texts, return_special_tokens_mask=True)
    return [
        _without_added_end(tokenizer, ids, added)
        for ids, added in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    ]


def _without_added_end(tokenizer: Any, ids: list[int], added: Sequence[int]) -> list[int]:
    if 0 not in added:
        return ids[: ids[:1] == [tokenizer.bos_token_id]]
    num_added = next(num for num, is_added in enumerate(reversed(added)) if not is_added)
    return ids[: len(ids) - num_added]


def continued_token_ids(tokenizer: Any, texts: Sequence[RenderedPrompt]) -> list[list[int]]:
    """Return the token ids of each text as the continuation of another: a tokenizer adds no space in front of it."""
    anchors = _anchors(tokenizer)
    return [_behind_an_anchor(tokenizer, text, anchors) for text in texts] if anchors else token_ids(tokenizer, texts)


def _behind_an_anchor(tokenizer: Any, text: RenderedPrompt, anchors: Sequence[tuple[str, list[int]]]) -> list[int]:
    for anchor, start in anchors if text else ():
        (ids,) = token_ids(tokenizer, [text.after(anchor)])
        if ids[: len(start)] == start:
            return ids[len(start) :]
    (ids,) = token_ids(tokenizer, [text])
    return ids


@functools.lru_cache(maxsize=8)
def _anchors(tokenizer: Any) -> Sequence[tuple[str, list[int]]]:
    """Return texts with their token ids, or nothing if the tokenizer adds no space in front of a text."""
    added: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    if not str(tokenizer.convert_ids_to_tokens(added[:1] or [0])[0]).startswith(("▁", "Ġ")):
        return ()
    encoded = [(anchor, tokenizer(anchor, add_special_tokens=False)["input_ids"]) for anchor in ANCHORS]
    return [(anchor, ids) for anchor, ids in encoded if ids and tokenizer.unk_token_id not in ids]


def scored_token_ids(tokenizer: Any, prompts: Sequence[str], responses: Sequence[str]) -> list[list[int]]:
    """Return the token ids of prompt, response and one end of sequence, as a reward model is trained and asked.

    The tokenizer puts its special tokens before the text, unless the text starts with one, as chat templates write it.
    Special tokens that a response spells are text, unless a chat template wrote them or the prompt is empty: then the
    response is a whole text.
    """
    texts = [_with_response(tokenizer, prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    return [[*ids, tokenizer.eos_token_id] for ids in whole_token_ids(tokenizer, texts)]


def _with_response(tokenizer: Any, prompt: str, response: str) -> RenderedPrompt:
    if not isinstance(response, RenderedPrompt):
        response = without_end(response, tokenizer.eos_token)
        response = as_text(tokenizer, response, is_answer=True) if prompt else RenderedPrompt(response)
    return response.after(as_text(tokenizer, prompt))


def whole_token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts, either plain or written by a chat template, without an end of sequence."""

    def kind(text: RenderedPrompt) -> tuple[bool, bool]:
        is_begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        return is_begun and not (text.literals and text.literals[0][0] == 0), bool(text.literals)

    ids: list[list[int]] = []
    for (is_begun, has_literals), alike in itertools.groupby((as_text(tokenizer, text) for text in texts), key=kind):
        if has_literals:
            ids += [_literal_ids(tokenizer, text, add_special_tokens=not is_begun) for text in alike]
        elif is_begun:
            ids += tokenizer(list(alike), add_special_tokens=False)["input_ids"]
        else:
            ids += _begun(tokenizer, list(alike))
    return ids


def without_end(text: str, end: str | None) -> str:
    """Return the text without the end-of-sequence tokens, and the whitespace behind them, that it ends with."""
    while end and (stripped := text.rstrip()).endswith(end):
        text = stripped.removesuffix(end)
    return text


def _literal_ids(tokenizer: Any, text: RenderedPrompt, *, add_special_tokens: bool) -> list[int]:
    """Return the token ids of a text with literals, which never become control tokens."""
    return _literal_tokenizer(tokenizer).encode(text, add_special_tokens=add_special_tokens)


class LiteralTokenizer:
    """Encodes texts in which some spellings of control tokens are text and others are control tokens.

    Works on a copy of the tokenizer without control tokens, which reads all spellings as text. Each control token has
    an alias there that no text can spell, which replaces the spellings that are control tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import AddedToken, Tokenizer

        added = {id: token for id, token in tokenizer.added_tokens_decoder.items() if str(token)}
        control = {id: token for id, token in added.items() if token.special or is_control(str(token))}
        self._tokenizer, self._pattern = tokenizer, control_spellings(tokenizer).pattern
        self._unknown: int | None = tokenizer.unk_token_id
        self._control_ids = set(control) - {self._unknown}
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        kept = [token for token in parts["added_tokens"] if token["id"] not in control]
        parts |= {"added_tokens": [], "truncation": None, "padding": None}
        self._backend: Any = Tokenizer.from_str(json.dumps(parts))
        nonce = secrets.token_hex(8)
        self._aliases = {str(token): f"\ue000{nonce}-{id}\ue000" for id, token in control.items()}
        texts = {token["id"]: token["content"] for token in kept}
        texts |= {id: self._aliases[str(token)] for id, token in control.items()}
        self._backend.add_tokens([_copied(AddedToken, added[id], text) for id, text in texts.items() if id in added])
        self._ids = {self._backend.token_to_id(text): id for id, text in texts.items() if id in added}

    def encode(self, text: RenderedPrompt, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids; the tokenizer's special tokens are put before the text, none behind it."""
        encoded = self._backend.encode(self._aliased(text), add_special_tokens=add_special_tokens)
        ids, added = list(encoded.ids), encoded.special_tokens_mask
        known = [(id if is_added else self._known(id), is_added) for id, is_added in zip(ids, added, strict=True)]
        kept = [(id, is_added) for id, is_added in known if id is not None]
        return _without_added_end(self._tokenizer, [id for id, _ in kept], [is_added for _, is_added in kept])

    def _known(self, id: int) -> int | None:
        """Return the tokenizer's id of a token of the copy; the model's own piece for a spelling is unknown."""
        if id in self._ids:
            return int(self._ids[id])
        return self._unknown if id in self._control_ids else id

    def _aliased(self, text: RenderedPrompt) -> str:
        """Return the text with aliases in place of the control tokens that are not literals."""
        pattern = self._pattern
        if pattern is None:
            return text
        places, pieces = [0, *itertools.chain(*text.literals), len(text)], list[str]()
        for number, (start, end) in enumerate(itertools.pairwise(places)):
            piece = text[start:end]
            pieces.append(piece if number % 2 else pattern.sub(lambda found: self._aliases[found[0]], piece))
        return "".join(pieces)


def _copied(kind: Any, token: Any, text: str) -> Any:
    flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip")}
    return kind(text, **flags, normalized=token.normalized and text == str(token), special=False)


@functools.lru_cache(maxsize=8)
def _literal_tokenizer(tokenizer: Any) -> LiteralTokenizer:
    return LiteralTokenizer(tokenizer)
