"""Finds the control tokens of a tokenizer, and those that messages spell, which are text and not control tokens.

Control tokens are the special tokens, and the added tokens in brackets that are not flagged as special, such as
`<think>` and `<tool_response>` of Qwen3. An assistant's message may spell those of its thoughts and calls (OWN_WORDS)
unless they are flagged: data sets write them so, and chat templates look for them.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

MARKS = range(0xE001, 0xF8FF)
"""Characters of Unicode's private use area, of which one that no message holds marks control tokens in messages."""
BRACKETED = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")
HTML = re.compile(
    r"</?(a|b|blockquote|br|caption|code|col|div|em|h[1-6]|hr|i|img|li|ol|p|pre|q|s|span|strong|sub|sup|table|tbody|td"
    r"|tfoot|th|thead|tr|u|ul)/?>"
)
"""Elements that some vocabularies hold as added tokens. They are ordinary text."""
OWN_WORDS = re.compile(
    r"</?(think(ing)?|thoughts?|reason(ing)?|tool_calls?|function_calls?|answer|solution|scratchpad)>"
)
ASSISTANT = "assistant"


class RenderedPrompt(str):
    """A text that the chat template wrote: its special tokens are in the text, the tokenizer adds none.

    `literals` are the spans, in order, in which a message spells control tokens: they are text, not control tokens.
    `messages` are those of which it is the prompt, if any.
    """

    literals: tuple[tuple[int, int], ...]
    messages: tuple[dict[str, Any], ...]

    def __new__(
        cls, text: str = "", literals: Iterable[tuple[int, int]] = (), messages: Iterable[dict[str, Any]] = ()
    ) -> Self:
        rendered = super().__new__(cls, text)
        rendered.literals = tuple(literals)
        rendered.messages = tuple(messages)
        return rendered

    def part(self, start: int, end: int | None = None) -> RenderedPrompt:
        """Return the text from `start` to `end`, with its literals."""
        text = self[start:end]
        inside = ((max(first - start, 0), min(last - start, len(text))) for first, last in self.literals)
        return RenderedPrompt(text, [span for span in inside if span[0] < span[1]])

    def marked(self, mark: str) -> str:
        """Return the text with a mark behind each character of its literals."""
        places = [0, *itertools.chain(*self.literals), len(self)]
        pieces = [self[start:end] for start, end in itertools.pairwise(places)]
        return "".join(_with_marks(piece, mark) if number % 2 else piece for number, piece in enumerate(pieces))

    def after(self, text: str) -> RenderedPrompt:
        """Return the text with `text` in front, with the literals of both."""
        own = text.literals if isinstance(text, RenderedPrompt) else ()
        shifted = ((len(text) + first, len(text) + last) for first, last in self.literals)
        return RenderedPrompt(text + str(self), [*own, *shifted])


class Spellings(NamedTuple):
    """Texts of tokens, their pattern, and the beginnings and ends that could be completed by what stands beside them.

    The pattern is None if there are no tokens.
    """

    pattern: re.Pattern[str] | None
    beginnings: frozenset[str]
    ends: frozenset[str]
    max_length: int

    @classmethod
    def of(cls, texts: Iterable[str]) -> Spellings:
        """Return the spellings of these tokens."""
        tokens = set(texts)
        if not tokens:
            return cls(None, frozenset(), frozenset(), 0)
        beginnings = frozenset(text[:end] for text in tokens for end in range(1, len(text)))
        ends = frozenset(text[start:] for text in tokens for start in range(1, len(text)))
        return cls(_pattern_of(tokens), beginnings, ends, max(map(len, tokens)))

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Return the spans of the text that spell tokens."""
        return [found.span() for found in self.pattern.finditer(text)] if self.pattern else []

    def marked(self, text: str, mark: str) -> str:
        """Return the text with a mark behind each character of a token, and of a part of one at either end.

        Two messages that a template puts side by side could spell a token together.
        """
        if self.pattern is None:
            return text

        text = self.whole_marked(text, mark)
        last, first = text.rstrip(), text.lstrip()
        num = self._length(lambda size: last[-size:] in self.beginnings)
        if num:
            text = last[:-num] + _with_marks(last[-num:], mark) + text[len(last) :]
            first = text.lstrip()
        num = self._length(lambda size: first[:size] in self.ends)
        return text[: len(text) - len(first)] + _with_marks(first[:num], mark) + first[num:] if num else text

    def whole_marked(self, text: str, mark: str) -> str:
        """Return the text with a mark behind each character of a token."""
        return self.pattern.sub(lambda found: _with_marks(found[0], mark), text) if self.pattern else text

    def _length(self, is_part: Callable[[int], bool]) -> int:
        return next((size for size in range(self.max_length - 1, 0, -1) if is_part(size)), 0)


def _pattern_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that finds the longest of the texts at each place.

    It shares their common beginnings: some vocabularies have thousands of control tokens.
    """
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}
    return re.compile(_regex_of(tree))


def _regex_of(tree: Mapping[str, Any]) -> str:
    branches = [re.escape(character) + _regex_of(rest) for character, rest in sorted(tree.items()) if character]
    if "" in tree:
        return f"(?:{'|'.join(branches)})?" if branches else ""
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"


def _with_marks(text: str, mark: str) -> str:
    return "".join(character + mark for character in text)


def special_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """Return the pattern of the tokenizer's special tokens as they are spelled, or None if it has none."""
    return _special_spellings(tokenizer).pattern


@functools.lru_cache(maxsize=8)
def _special_spellings(tokenizer: Any) -> Spellings:
    return Spellings.of(text for text, is_special in _added(tokenizer) if is_special)


@functools.lru_cache(maxsize=8)
def answer_spellings(tokenizer: Any) -> Spellings:
    """Return the spellings of the control tokens that an assistant's message may not spell."""
    return Spellings.of(
        text
        for text, is_special in _added(tokenizer)
        if is_special or (is_control(text) and OWN_WORDS.fullmatch(text) is None)
    )


@functools.lru_cache(maxsize=8)
def control_spellings(tokenizer: Any) -> Spellings:
    """Return the spellings of the tokenizer's control tokens, the special ones included."""
    return Spellings.of(text for text, is_special in _added(tokenizer) if is_special or is_control(text))


def is_control(text: str) -> bool:
    """Return whether an added token that is not flagged as special is a control token, by its spelling."""
    return BRACKETED.fullmatch(text) is not None and HTML.fullmatch(text.lower()) is None


def _added(tokenizer: Any) -> list[tuple[str, bool]]:
    added = tokenizer.added_tokens_decoder.values()
    return [(str(token), token.special) for token in added if str(token)]


class SpelledTokens:
    """Marks the control tokens that messages and tools spell while a template renders them, to find them in its text.

    In texts of the assistant its own words are not marked, nor tokens that the policy sampled: only the literals of a
    sampled text are. With `allowed`, nothing is.
    """

    def __init__(self, tokenizer: Any, values: Any, *, allowed: bool = False) -> None:
        self._control, self._foreign = control_spellings(tokenizer), answer_spellings(tokenizer)
        texts = list(_texts(values))
        self._mark = next(mark for mark in map(chr, MARKS) if not any(mark in text for text in texts))
        self._is_marking, self._has_marked = not allowed, False

    def marked(self, value: Any) -> Any:
        """Return messages or tools with a mark behind each character of a control token that their texts spell."""
        if not self._is_marking:
            return value
        if isinstance(value, list):
            return [self._marked(each, self._spellings_of(each)) for each in value]
        return self._marked(value, self._control)

    def _spellings_of(self, message: Any) -> Spellings:
        is_own = isinstance(message, Mapping) and message.get("role") == ASSISTANT
        return self._foreign if is_own else self._control

    def _marked(self, value: Any, spellings: Spellings) -> Any:
        if isinstance(value, RenderedPrompt) and spellings is self._foreign:
            return self._noted(value, value.marked(self._mark))
        if isinstance(value, str):
            return self._noted(value, spellings.marked(value, self._mark))
        if isinstance(value, Mapping):
            return {self._whole(key): self._field(key, each, spellings) for key, each in value.items()}
        return [self._marked(each, spellings) for each in value] if isinstance(value, list | tuple) else value

    def _field(self, key: Any, value: Any, spellings: Spellings) -> Any:
        return self._whole(value) if key == "role" else self._marked(value, spellings)

    def _whole(self, text: Any) -> Any:
        """Return a key or role, which templates compare or write next to brackets, with its whole tokens marked."""
        return self._noted(text, self._control.whole_marked(text, self._mark)) if isinstance(text, str) else text

    def _noted(self, text: str, marked: str) -> str:
        self._has_marked |= len(text) != len(marked)
        return marked

    def unmarked(self, text: str) -> RenderedPrompt:
        """Return the text without marks; its literals are the marked characters that are part of a control token."""
        if not self._has_marked:
            return RenderedPrompt(text)
        plain, literals = "", list[tuple[int, int]]()
        for number, piece in enumerate(re.split(f"((?:[^{self._mark}]{self._mark})+)", text)):
            piece = piece.replace(self._mark, "")
            if number % 2:
                literals.append((len(plain), len(plain) + len(piece)))
            plain += piece
        spelled = self._control.spans(plain)
        return RenderedPrompt(
            plain, [(a, b) for a, b in literals if any(first < b and a < last for first, last in spelled)]
        )


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in messages, tools or parts of them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | Sequence):
        for each in (*value, *value.values()) if isinstance(value, Mapping) else value:
            yield from _texts(each)
