"""Builds the messages that a chat template writes as history, and compares kept tokens with the same ones of today."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from cluster.data.chat_template import Message, RenderedPrompt
from rollout_actors.environments.tools import MAX_CALLS, call_id
from rollout_actors.tool_calls import ParsedResponse, ToolCall

CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1")
"""A template's request for today's date, with its format."""


def assistant_message(text: str, parsed: ParsedResponse | None) -> Message:
    """Return a response as templates take it: a text, or what it consists of if it calls functions or has channels.

    A response with a call that cannot be read stays a text.
    """
    calls = parsed.calls if parsed is not None else ()
    if parsed is None or any(call.error for call in calls) or not (calls or parsed.has_channels):
        return {"role": "assistant", "content": text}
    content: str = parsed.text
    if isinstance(text, RenderedPrompt) and text.startswith(content):
        content = text.part(0, len(content))
    message: Message = {"role": "assistant", "content": content}
    if parsed.has_channels and parsed.thoughts:
        message |= {"thinking": parsed.thoughts, "reasoning_content": parsed.thoughts}
        message |= {"content": ""} if calls else {}
    return message | ({"tool_calls": structured(calls)} if calls else {})


def structured(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """Return calls in OpenAI's form, with the ids that their results have."""
    return [
        {"id": call_id(number), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for number, call in enumerate(calls[: MAX_CALLS + 1])
    ]


def as_users(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with results of functions as messages of the user."""
    return [
        {"role": "user", "content": message["content"]} if message["role"] == "tool" else dict(message)
        for message in messages
    ]


def differ_by_date(tokenizer: Any, own: Sequence[int], kept: Sequence[int]) -> bool:
    """Return whether the tokens `kept` are those of `own` with another date where the template writes today's."""
    formats = {form for _, form in CLOCK.findall(str(tokenizer.chat_template))}
    if not formats:
        return False
    today = {datetime.now().strftime(form): form for form in formats}
    own_text, kept_text = (tokenizer.decode(list(ids), skip_special_tokens=False) for ids in (own, kept))
    dates = "|".join(map(re.escape, sorted(today, key=len, reverse=True)))
    pieces = re.split(f"({dates})", own_text)
    pattern = "".join("(.+?)" if number % 2 else re.escape(piece) for number, piece in enumerate(pieces))
    found = re.fullmatch(pattern, kept_text, re.DOTALL)
    return found is not None and all(map(_is_date, found.groups(), (today[piece] for piece in pieces[1::2])))


def _is_date(text: str, form: str) -> bool:
    try:
        datetime.strptime(text, form)
    except ValueError:
        return False
    return True
