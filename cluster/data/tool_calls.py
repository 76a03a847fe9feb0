"""Fits tools and tool calls of a data set to a chat template: refuses a template that leaves them out."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cluster.data.chat_template import Message, render
from cluster.errors import InputError

NAME, VALUE = "antiphon_function", "antiphon_value"
QUESTION = {"role": "user", "content": "?"}


class _Support(NamedTuple):
    """Whether a template writes tools and tool calls, and whether it takes arguments as a text of JSON for a text."""

    tools: bool
    calls: bool
    quotes_arguments: bool


def require_tools_written(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], where: str
) -> None:
    """Raise InputError at `where` if the chat template leaves out the row's tools or tool calls."""
    has_calls = any(message.get("tool_calls") for message in messages)
    if not tools and not has_calls:
        return
    support = _support(tokenizer, str(tokenizer.chat_template))
    for is_held, is_written, what in ((tools, support.tools, "tools"), (has_calls, support.calls, "tool calls")):
        if is_held and not is_written:
            advice = "set model.chat_template to one that writes them, or leave them out of the data"
            raise InputError(where, f"the chat template does not write the row's {what}: {advice}")


def with_objects(tokenizer: Any, messages: Sequence[Message]) -> list[Message]:
    """Return the messages with arguments of tool calls as objects if the template would quote a text of JSON.

    As an engine does with the requests that it serves.
    """
    texts = any(isinstance(_arguments(call), str) for message in messages for call in message.get("tool_calls") or ())
    if not texts or not _support(tokenizer, str(tokenizer.chat_template)).quotes_arguments:
        return list(messages)
    return [
        {**message, "tool_calls": [_parsed(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _arguments(call: Mapping[str, Any]) -> Any:
    function = call.get("function", call)
    return function.get("arguments") if isinstance(function, Mapping) else None


def _parsed(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call with its arguments as an object, if they are the text of one."""
    arguments = _arguments(call)
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else None
    except ValueError:  # not JSON: the template gets the text as it is
        parsed = None
    if not isinstance(parsed, Mapping):
        return dict(call)
    if "function" in call:
        return {**call, "function": {**call["function"], "arguments": parsed}}
    return {**call, "arguments": parsed}


@functools.lru_cache(maxsize=8)
def _support(tokenizer: Any, template: str) -> _Support:
    schema = {"name": NAME, "description": NAME, "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": schema}]
    arguments = {"x": VALUE}
    listed = _rendered(tokenizer, [QUESTION], tools)
    as_object, as_text = (_with_call(tokenizer, given) for given in (arguments, json.dumps(arguments)))
    quoted = json.dumps(json.dumps(arguments))
    return _Support(
        tools=listed is None or NAME in listed,
        calls=as_object is None or NAME in as_object or VALUE in as_object,
        quotes_arguments=as_text is not None and quoted in as_text,
    )


def _with_call(tokenizer: Any, arguments: Any) -> str | None:
    call = {"id": "antiphon1", "type": "function", "function": {"name": NAME, "arguments": arguments}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "antiphon1", "name": NAME, "content": "?"}
    return _rendered(tokenizer, [QUESTION, answer, result], ())


def _rendered(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the text of a conversation, or None if the template refuses it: the row's own error says more."""
    try:
        return render(tokenizer, messages, "template", is_prompt=False, tools=tools)
    except InputError:
        return None
