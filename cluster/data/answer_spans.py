"""Finds the answers of the model in the text that a chat template wrote for a prompt.

A copy of the template marks which message it writes. Without the marks it must write the same text.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cluster.data.chat_settings import settings_of
from cluster.data.chat_template import ANSWER, Message, RenderedPrompt, marked_text, render, special_tokens
from cluster.data.template_marks import MARK
from cluster.data.text_tokens import token_ids
from cluster.errors import InputError

Span = tuple[int, int]
"""From the first place of a part to the one behind its last."""
ASSISTANT = "assistant"


def answer_token_spans(
    tokenizer: Any,
    messages: Sequence[Message],
    prompt: RenderedPrompt,
    ids: Sequence[int],
    where: str,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[Span]:
    """Return the tokens that the model writes for each answer among the messages of a prompt.

    `ids` are the tokens of the rendered prompt. A token that belongs to an answer in part is left out. Raises
    InputError as `answer_spans` does.
    """
    spans = answer_spans(tokenizer, messages, prompt, where, tools=tools)
    cuts = token_ids(tokenizer, [prompt.part(0, place) for span in spans for place in span])
    found = []
    for start, end in zip(cuts[::2], cuts[1::2], strict=True):
        first, last = _num_common(start, ids), _num_common(end, ids)
        found.append((first + (first < len(start)), last))
    return [span for span in found if span[0] < span[1]]


def _num_common(ids: Sequence[int], others: Sequence[int]) -> int:
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, others, strict=False))
    return sum(1 for _ in equal)


def answer_spans(
    tokenizer: Any,
    messages: Sequence[Message],
    prompt: RenderedPrompt,
    where: str,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[Span]:
    """Return the parts of a rendered prompt that the model writes, one for each of its answers.

    A part begins behind the header with which a prompt ends, and ends with the template's special token. If the
    template ends an answer in history with another token than the last answer, that token is no part: the model would
    learn to go on. Raises InputError at `where` if the template does not write the messages one by one in a loop.
    """
    whole = settings_of(tokenizer).with_system_prompt(messages)
    written = _written(marked_text(tokenizer, messages, where, tools=tools), prompt, len(whole))
    spans = []
    for span, message in zip(written, whole, strict=True):
        if message["role"] == ASSISTANT:
            if span is None:
                what = "the chat template does not write the messages one by one, so the answers cannot be told apart"
                raise InputError(where, f'{what}: set sft.train_on = "last"')
            spans.append(_answer(tokenizer, prompt, span, _turn_ends(tokenizer, str(tokenizer.chat_template))))
    return spans


def _written(text: str, plain: str, num: int) -> list[Span | None]:
    """Return the part of the plain text that was written for each of `num` messages, from the text with marks."""
    spans: list[Span | None] = [None] * num
    pieces = re.split(f"{MARK}(\\d+){MARK}", text)
    if "".join(pieces[::2]) != plain:
        return spans
    place = len(pieces[0])
    for number, piece in zip(map(int, pieces[1::2]), pieces[2::2], strict=True):
        before = spans[number]
        if piece.strip():
            spans[number] = (before[0] if before else place, place + len(piece))
        place += len(piece)
    return spans


class _TurnEnds(NamedTuple):
    """The text before an answer with which a prompt ends, and the special tokens behind the last and other answers."""

    header: str
    final: str
    history: str


@functools.lru_cache(maxsize=8)
def _turn_ends(tokenizer: Any, template: str) -> _TurnEnds:
    question = {"role": "user", "content": "?"}
    known, where = [question, {"role": ASSISTANT, "content": ANSWER}], str(tokenizer.name_or_path)
    asked = render(tokenizer, [question], where, is_prompt=True)
    plain = render(tokenizer, [question], where, is_prompt=False)
    pattern, talks = special_tokens(tokenizer), (known, [*known, question])
    tails = [render(tokenizer, talk, where, is_prompt=False).rpartition(ANSWER)[2] for talk in talks]
    final, history = (found[0] if pattern and (found := pattern.search(tail)) else "" for tail in tails)
    return _TurnEnds(asked.removeprefix(plain) if asked.startswith(plain) else "", final, history)


def _answer(tokenizer: Any, prompt: RenderedPrompt, span: Span, ends: _TurnEnds) -> Span:
    text = str(prompt[span[0] : span[1]])
    start, end = span[0] + _header_length(tokenizer, text, ends.header), span[0] + len(text.rstrip())
    pattern = special_tokens(tokenizer)
    for found in reversed(list(pattern.finditer(prompt, start, span[1])) if pattern else []):
        if not any(first < found.end() and found.start() < last for first, last in prompt.literals):
            is_replaced = ends.history != ends.final and found[0] == ends.history
            end = found.start() if is_replaced else found.end()
            break
    return start, max(start, end)


def end_of_text(tokenizer: Any, whole: RenderedPrompt) -> int:
    """Return where the text ends before the special token, if any, with which the template ended it."""
    pattern, end = special_tokens(tokenizer), len(whole.rstrip())
    last = next((found for found in pattern.finditer(whole) if found.end() == end), None) if pattern else None
    return last.start() if last else end


def _header_length(tokenizer: Any, text: str, header: str) -> int:
    """Return the length of the header with which a message's part begins.

    A header may end with the beginning of the model's thoughts, which a template may leave out of history.
    """
    if text.startswith(header):
        return len(header)
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, header, strict=False))
    common = "".join(character for character, _ in equal)
    pattern = special_tokens(tokenizer)
    ends = [found.end() for found in pattern.finditer(common)] if pattern else []
    return max([0, *ends, common.rfind("\n") + 1])
