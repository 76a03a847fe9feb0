"""Turns the tokens of a response into text that keeps what carries meaning: thoughts, tool marks, channels, unknowns.

A response is decoded behind the end of its context, because some tokenizers drop a leading space of a text alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from cluster.data.control_tokens import RenderedPrompt, answer_spellings

CONTEXT_TOKENS = 8
"""How many tokens of the context are decoded with a response."""


class ResponseText:
    """Decodes responses with their special tokens, except beginning, end and padding, as `keep_special_tokens` says."""

    def __init__(self, tokenizer: Any, end_ids: Collection[int], keep: bool | Sequence[str] = True) -> None:
        self._tokenizer = tokenizer
        self._special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._spellings = answer_spellings(tokenizer)
        spelled = {id: self._spellings.spans(str(token)) for id, token in tokenizer.added_tokens_decoder.items()}
        self._control = {id for id, spans in spelled.items() if spans}
        around = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, *end_ids}
        names = () if isinstance(keep, bool) else keep
        named = {id for id, token in tokenizer.added_tokens_decoder.items() if str(token) in names}
        self._dropped = (around if keep is True else around | self._special) - named
        self._needs_context = _drops_a_space(tokenizer)

    def decode(self, token_ids: Sequence[int], context: Sequence[int] = ()) -> str:
        """Return the text of a response; its literals are special tokens that the response spells letter by letter."""
        kept = [id for id in token_ids if id not in self._dropped]
        before = (
            list(context[-CONTEXT_TOKENS:]) if self._needs_context and not self._special.issuperset(context) else []
        )
        start = self._text(before)
        whole = self._text([*before, *kept])
        if not whole.startswith(start):
            before, start, whole = [], "", self._text(kept)
        text = whole[len(start) :]
        spans = self._spellings.spans(text)
        real = [place for place, id in enumerate(kept) if id in self._control]
        if not spans or not real:
            return text
        places = {len(self._text([*before, *kept[:place]])) - len(start) for place in real}
        return RenderedPrompt(text, [span for span in spans if span[0] not in places])

    def _text(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


def _drops_a_space(tokenizer: Any) -> bool:
    """Return whether the tokenizer drops the space in front of a text that is decoded alone, as SentencePiece does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = b"" if backend is None or backend.decoder is None else backend.decoder.__getstate__()
    return backend is None or b"Metaspace" in decoder or b"Strip" in decoder
