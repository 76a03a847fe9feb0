"""Conversations of each kind that a chat template may treat in its own way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.conformance.tokenizers import Source
from tests.support.chat import assistant, user

Message = dict[str, Any]
SYSTEM: Message = {"role": "system", "content": "Answer in one word."}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Return the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city"}},
            "required": ["city"],
        },
    },
}
CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
    ],
}
RESULT: Message = {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "12 °C, naïve <b>sun</b>"}


@dataclass(frozen=True)
class Case:
    """A prompt with an answer, the tools and the template's arguments."""

    prompt: list[Message]
    answer: str = " It is 42,\n\nof course. 你好"
    tools: Sequence[dict[str, Any]] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


FIRST = user("What is 6 × 7?\n  <table> [x] ~ 😀")
TURNS = [FIRST, assistant("42"), user("Sure? Ça va?")]
CASES = {
    "single turn": Case([FIRST]),
    "several turns": Case(TURNS),
    "system prompt": Case([SYSTEM, *TURNS]),
    "prefill": Case([FIRST, assistant("The answer is")], " 42."),
    "tools": Case([user("Weather in Zürich?"), CALL, RESULT], tools=[WEATHER]),
    "thoughts": Case(
        [FIRST, assistant("<think>\n6 × 7\n</think>\n\n42"), user("Sure?")], "<think>\nYes.\n</think>\n\nSure."
    ),
    "no thoughts": Case(TURNS, "Sure.", kwargs={"enable_thinking": False}),
}


def cases_of(source: Source) -> dict[str, Case]:
    """Return the cases that a tokenizer's template knows."""
    known = set(CASES)
    if not source.has_tools:
        known -= {"tools"}
    if not source.has_thoughts:
        known -= {"thoughts", "no thoughts"}
    return {name: case for name, case in CASES.items() if name in known}
