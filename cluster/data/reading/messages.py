"""Checks messages and tools of a row, and converts those of other formats (ShareGPT, content in parts)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.errors import InputError

Message = dict[str, Any]
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
"""Who speaks in ShareGPT -> role of the message."""
CALL = "function_call"
"""ShareGPT's name of a turn whose value is a tool call as JSON."""


def holds_messages(value: Any) -> bool:
    """Return whether a value is meant as a list of messages: all have a role, and one has a content or tool calls."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in value)
        and any("content" in message or "tool_calls" in message for message in value)
    )


def _is_parts(content: Any) -> bool:
    """Return whether a content is a list of parts, as of models that take images too."""
    return isinstance(content, list) and all(isinstance(part, Mapping) and "type" in part for part in content)


def holds_shares(value: Any) -> bool:
    """Return whether a value is a list of ShareGPT's turns."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, Mapping) and isinstance(turn.get("from"), str) and "value" in turn for turn in value)
    )


def checked_messages(value: Any, column: str, where: str) -> list[Message]:
    """Return the messages of a row, of ShareGPT's turns too. Raises InputError at `where` for other values."""
    if isinstance(value, Mapping):
        value = [value]
    if not value:
        raise InputError(where, f"column {column!r}: no messages")
    if not isinstance(value, list):
        raise InputError(where, f"column {column!r}: expected messages of role and content, got {value!r:.80}")
    if holds_shares(value):
        return [_from_share(turn, column, where) for turn in value]
    return [_checked_message(message, column, where) for message in value]


def _checked_message(message: Any, column: str, where: str) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(where, f"column {column!r}: a message without role as text")
    content = message.get("content")
    if isinstance(content, list) and _is_parts(content):
        return {**message, "content": _joined(content, column, where)}
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise InputError(where, f"column {column!r}: a message without content as text")
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        raise InputError(where, f"column {column!r}: tool_calls must be a list of objects, got {calls!r:.80}")
    return dict(message)


def _joined(parts: Sequence[Mapping[str, Any]], column: str, where: str) -> str:
    """Return the text of a content that is given in parts."""
    for part in parts:
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            raise InputError(where, f"column {column!r}: a message has a part of type {part['type']!r}, not text")
    return "".join(part["text"] for part in parts)


def _from_share(turn: Mapping[str, Any], column: str, where: str) -> Message:
    speaker, value = turn["from"], turn["value"]
    role = ROLES.get(speaker.lower())
    if role is None:
        known = ", ".join(ROLES)
        raise InputError(where, f"column {column!r}: a turn is from {speaker!r}, which is none of {known}")
    if not isinstance(value, str):
        raise InputError(where, f"column {column!r}: a turn without value as text")
    if speaker.lower() == CALL:
        return {"role": role, "content": None, "tool_calls": _calls(value, column, where)}
    return {"role": role, "content": value}


def _calls(value: str, column: str, where: str) -> list[dict[str, Any]]:
    try:
        parsed = json.loads(value)
    except ValueError as error:
        raise InputError(where, f"column {column!r}: the value of a {CALL} is not JSON ({error})") from error
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        raise InputError(where, f"column {column!r}: the value of a {CALL} has no name: {value:.80}")
    return [{"type": "function", "function": call} for call in calls]


def checked_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Return the functions of a row's column `tools`, given as a list or as a text of JSON, or None."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise InputError(where, f"column 'tools': not JSON ({error})") from error
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise InputError(where, f"column 'tools': expected a list of JSON schemas, got {value!r:.80}")
    return [dict(tool) for tool in value] or None
