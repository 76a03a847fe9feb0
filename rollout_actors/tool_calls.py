"""Reads thoughts and calls of functions in a response's text. Imports neither torch, ray nor vllm.

A call in JSON is `{"name": ..., "arguments": {...}}`; `parameters` also counts as `arguments`, which may be JSON in a
text. It stands behind a mark, or a response is nothing but such calls.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from cluster.data.unicode_text import as_unicode

CALL_MARK = "<tool_call>"
THOUGHTS = ("<think>", "</think>")
CALL_KEYS = {"name", "arguments", "parameters", "id", "type"}
"""The keys of a call that is a whole response: with another key, the response is an ordinary JSON answer."""


class ToolCall(NamedTuple):
    """A call of a function, or in `error` why it cannot be read."""

    name: str
    arguments: dict[str, Any]
    error: str = ""


@dataclass(frozen=True, slots=True)
class ParsedResponse:
    """What a response consists of: thoughts, calls, and the text before the first call, its thoughts included.

    `has_channels` is true if thoughts and content stand in messages of their own, so that `text` has no thoughts.
    """

    text: str
    thoughts: str
    calls: Sequence[ToolCall]
    has_channels: bool = False


class ResponseParser(Protocol):
    """Reads responses in the form that a model's chat template teaches."""

    def read(self, before: Sequence[int], token_ids: Sequence[int]) -> ParsedResponse:
        """Return what a response consists of; `before` are the tokens of its prompt."""


def read_calls(content: str, names: Collection[str], *, mark: str = CALL_MARK) -> list[ToolCall]:
    """Return the calls in a response without its thoughts: those behind marks, or those that the response is.

    Without a mark, an object or a list of objects is calls only if each names one of the functions `names`.
    """
    if mark in content:
        return [call for piece in content.split(mark)[1:] for call in _behind_mark(piece)]
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return []
    entries = [_unwrapped(entry) for entry in (value if isinstance(value, list) else [value])]
    is_calls = all(isinstance(entry, Mapping) and _is_call_of(entry, names) for entry in entries)
    return [_call(entry) for entry in entries] if is_calls else []


def _behind_mark(piece: str) -> list[ToolCall]:
    try:
        value, _ = json.JSONDecoder().raw_decode(piece.lstrip())
    except (ValueError, RecursionError) as error:
        return [ToolCall("", {}, f"the call is not JSON ({error})")]
    return [_call(_unwrapped(entry)) for entry in (value if isinstance(value, list) else [value])]


def _unwrapped(entry: Any) -> Any:
    """Return the function of a call in OpenAI's form, which is `{"function": {...}}`, or the entry itself."""
    inner = entry.get("function") if isinstance(entry, Mapping) else None
    return inner if isinstance(inner, Mapping) else entry


def _is_call_of(entry: Mapping[str, Any], names: Collection[str]) -> bool:
    name = entry.get("name")
    return isinstance(name, str) and name in names and set(entry) <= CALL_KEYS


def _call(entry: Any) -> ToolCall:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        return ToolCall("", {}, 'a call must be {"name": ..., "arguments": {...}}')
    return make_call(entry["name"], entry.get("arguments", entry.get("parameters")))


def make_call(name: str, arguments: Any) -> ToolCall:
    """Return a call with its arguments, which may be an object, JSON in a text (in a text again), or None.

    Replaces lone surrogates, which JSON can spell, by U+FFFD.
    """
    try:
        for _ in range(2):
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        name, arguments = as_unicode(name), as_unicode(arguments)
    except (ValueError, RecursionError) as error:
        return ToolCall(name, {}, f"the arguments are not JSON ({error})")
    if arguments is None:
        return ToolCall(name, {})
    if not isinstance(arguments, Mapping):
        return ToolCall(name, {}, "arguments must be an object")
    return ToolCall(name, {str(key): value for key, value in arguments.items()})


def without_thoughts(text: str, marks: tuple[str, str] = THOUGHTS, *, is_open: bool = False) -> tuple[str, str]:
    """Return the thoughts in a text, and the text without them.

    The thoughts stand between marks; the first mark may be in the prompt (`is_open`, or if the second comes first), and
    the second may be missing.
    """
    start, end = marks
    thoughts, content = list[str](), list[str]()
    first_end = text.find(end)
    inside = is_open or (first_end >= 0 and start not in text[:first_end])
    if is_open and text.lstrip().startswith(start):
        text = text.lstrip().removeprefix(start)
    while text:
        part, _, text = text.partition(end if inside else start)
        (thoughts if inside else content).append(part)
        inside = not inside
    return "".join(thoughts), "".join(content)
