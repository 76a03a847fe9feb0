"""Render conversations with a model's chat template, and split them into prompt and completion.

The caller passes a tokenizer of transformers. Does not import transformers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

from cluster.data.template_limit import COUNTER, counted, counter
from cluster.errors import InputError

Message = dict[str, Any]
ANSWER = "antiphon-answer-41f0"
"""Stands for the policy's response to find what the template writes after a response."""
MARKS = range(0xE001, 0xF8FF)
"""Characters of Unicode's private use area, of which one that no message holds marks special tokens in messages."""


class RenderedPrompt(str):
    """A text that the chat template wrote: its special tokens are in the text, the tokenizer adds none.

    `literals` are the spans, in order, in which a message spells special tokens: they are text, not special tokens.
    `messages` are those of which it is the prompt, if any.
    """

    literals: tuple[tuple[int, int], ...]
    messages: tuple[Message, ...]

    def __new__(
        cls, text: str = "", literals: Iterable[tuple[int, int]] = (), messages: Iterable[Message] = ()
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


def require_template(tokenizer: Any, where: str) -> None:
    """Raise InputError naming the data set and the model folder if its tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(where, f"holds messages, but the tokenizer of {tokenizer.name_or_path} has no chat template")


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    where: str,
    *,
    is_prompt: bool,
    tools: Sequence[Mapping[str, Any]] = (),
) -> RenderedPrompt:
    """Return the text of a conversation; a prompt ends where the model's turn begins.

    `tools` are the functions that the model may call, as JSON schemas. Special tokens that messages or tools spell are
    the text's literals. Raises InputError at `where`.
    """
    from jinja2 import TemplateError

    try:
        messages, tools = list(messages), list(tools)
        original = messages
        spelled = SpelledTokens(tokenizer, [messages, tools])
        messages, tools = spelled.marked(messages), spelled.marked(tools)
        text = _applied(tokenizer, messages, where, is_prompt=is_prompt, tools=tools)
        header = "" if is_prompt else _unasked_header(tokenizer, tokenizer.chat_template)
    except (TemplateError, ValueError, TypeError, ArithmeticError, LookupError, RecursionError) as error:
        raise InputError(where, f"the chat template refuses it: {error}") from error
    rendered = spelled.unmarked(text.removesuffix(header))
    return RenderedPrompt(rendered, rendered.literals, original if is_prompt else ())


def _applied(
    tokenizer: Any,
    messages: Sequence[Message],
    where: str,
    *,
    is_prompt: bool,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return what the chat template writes; raises InputError at `where` if it does not end."""
    return str(
        tokenizer.apply_chat_template(
            messages,
            tools=tools or None,
            tokenize=False,
            add_generation_prompt=is_prompt,
            chat_template=counted(tokenizer.get_chat_template(tools=tools or None)),
            **{COUNTER: counter(where)},
        )
    )


@functools.lru_cache(maxsize=8)
def _unasked_header(tokenizer: Any, template: str) -> str:
    """Return the header of the model's turn that the template writes even if not asked for it, else an empty text."""
    from jinja2 import TemplateError

    known = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]
    follow = {"role": "user", "content": "!"}
    try:
        texts = [
            _applied(tokenizer, messages, str(tokenizer.name_or_path), is_prompt=is_prompt)
            for messages, is_prompt in ((known, False), (known, True), ([*known, follow], False))
        ]
    except (TemplateError, ValueError, TypeError, ArithmeticError, LookupError):
        return ""
    tail, asked, history = (text.rpartition(ANSWER)[2] for text in texts)
    if tail != asked or history.startswith(tail):
        return ""
    pattern = special_tokens(tokenizer)
    found = pattern.search(tail) if pattern else None
    return str(tail[found.end() if found else 0 :].lstrip())


def ends_its_answers(tokenizer: Any, text: str) -> bool:
    """Return whether the template, which writes a header without being asked, ends its text with a special token."""
    pattern = special_tokens(tokenizer)
    if pattern is None or not _unasked_header(tokenizer, tokenizer.chat_template):
        return False
    return any(found.end() == len(text.rstrip()) for found in pattern.finditer(text))


@functools.lru_cache(maxsize=8)
def special_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """Return the pattern of the tokenizer's special tokens as they are spelled, or None if it has none."""
    texts = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special and str(token)]
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None


class SpelledTokens:
    """Marks the special tokens that messages spell while a template renders them, to find them in its text."""

    def __init__(self, tokenizer: Any, values: Any) -> None:
        pattern, texts = special_tokens(tokenizer), list(_texts(values))
        self._pattern = pattern if pattern and any(map(pattern.search, texts)) else None
        self._mark = next(mark for mark in map(chr, MARKS) if not any(mark in text for text in texts))

    def marked(self, value: Any) -> Any:
        """Return the value with a mark behind each character of a special token that its texts spell."""
        if self._pattern is None:
            return value
        if isinstance(value, str):
            return self._pattern.sub(lambda found: "".join(character + self._mark for character in found[0]), value)
        if isinstance(value, Mapping):
            return {key: self.marked(each) for key, each in value.items()}
        return [self.marked(each) for each in value] if isinstance(value, list | tuple) else value

    def unmarked(self, text: str) -> RenderedPrompt:
        """Return the text without marks; its literals are the marked characters."""
        if self._pattern is None:
            return RenderedPrompt(text)
        plain, literals = "", list[tuple[int, int]]()
        for number, piece in enumerate(re.split(f"((?:[^{self._mark}]{self._mark})+)", text)):
            piece = piece.replace(self._mark, "")
            if number % 2:
                literals.append((len(plain), len(plain) + len(piece)))
            plain += piece
        return RenderedPrompt(plain, literals)


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in messages, tools or parts of them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | Sequence):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(each)


def completion_after(prompt: Sequence[Any], whole: Sequence[Any], where: str) -> Sequence[Any]:
    """Return what follows the prompt in a rendered conversation (text or token ids).

    Raises InputError at `where` if it does not begin with the prompt: the model would be trained on a prompt that
    differs from the one it is sampled with.
    """
    if whole[: len(prompt)] != prompt:
        raise InputError(where, "the chat template renders the prompt alone differently from the whole conversation")
    return whole[len(prompt) :]


def split_at_last_answer(messages: Sequence[Message], where: str) -> tuple[list[Message], list[Message]]:
    """Split a conversation into prompt and completion; the completion is its last assistant message.

    Raises InputError at `where` if there is no assistant message, or if nothing precedes it.
    """
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise InputError(where, "no message has the role assistant")
    if not answers[-1]:
        raise InputError(where, "no message precedes the assistant's")
    return list(messages[: answers[-1]]), [messages[answers[-1]]]


def split_common(
    chosen: Sequence[Message], rejected: Sequence[Message], where: str
) -> tuple[list[Message], list[Message], list[Message]]:
    """Split two conversations into their common first messages (the prompt) and the rest of each.

    Each rest has at least the last message. Raises InputError at `where` if they share no message.
    """
    most = min(len(chosen), len(rejected)) - 1
    num = next((place for place in range(most) if chosen[place] != rejected[place]), most)
    if not num:
        raise InputError(where, "chosen and rejected have no first message in common, so no prompt")
    return list(chosen[:num]), list(chosen[num:]), list(rejected[num:])
