"""Functions that the policy may call in its response, as offered by an environment.

Results and errors of calls become the observation: the policy learns from both.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from cluster.data.chat_template import Message
from rollout_actors.environments.protocol import Step
from rollout_actors.tool_calls import ToolCall, read_calls, without_thoughts

Run = Callable[[Callable[..., Any], Mapping[str, Any]], Awaitable[Any]]
MAX_CALLS = 16
"""Maximum number of calls in one response. Further calls get an error as result."""
MAX_RESULT_CHARACTERS = 4_000


class Tools:
    """The functions of one environment.

    Raises ValueError if one lacks type hints or documented arguments.
    """

    def __init__(self, functions: Sequence[Callable[..., Any]] = ()) -> None:
        self._functions = {function.__name__: function for function in functions}
        self.schemas = [_schema(function) for function in functions]

    def calls(self, response: str) -> list[ToolCall]:
        """Return the calls in JSON in a response outside its thoughts; none if the environment offers no functions."""
        if not self._functions:
            return []
        _, content = without_thoughts(response)
        return read_calls(content.strip(), self._functions)

    async def results(self, calls: Sequence[ToolCall], run: Run) -> Step:
        """Return the results of these calls, as messages of the role `tool`.

        `run` calls a function. A ValueError, TypeError or KeyError becomes a result; other exceptions are raised.
        """
        results = [(call.name, await self._result(call, run)) for call in calls[:MAX_CALLS]]
        if len(calls) > MAX_CALLS:
            results.append((calls[MAX_CALLS].name, f"error: more than {MAX_CALLS} calls in one response"))
        messages: list[Message] = [
            {
                "role": "tool",
                "name": name,
                "tool_call_id": call_id(number),
                "content": result[:MAX_RESULT_CHARACTERS],
            }
            for number, (name, result) in enumerate(results)
        ]
        return Step(messages, 0.0, False, False, {})

    async def _result(self, call: ToolCall, run: Run) -> str:
        function = self._functions.get(call.name)
        if call.name and function is None:
            return f"error: no function {call.name!r}; the functions are {', '.join(self._functions)}"
        if call.error or function is None:
            return f"error: {call.error}"
        try:
            inspect.signature(function).bind(**call.arguments)
        except TypeError as error:
            return f"error: {error}"
        try:
            return _text(await run(function, call.arguments))
        except (ValueError, TypeError, KeyError) as error:
            return f"error: {type(error).__name__}: {error}"


def call_id(number: int) -> str:
    """Return the id of a response's call: nine letters and digits, as the templates of Mistral require."""
    return f"call{number:05}"


def _text(result: Any) -> str:
    return result if isinstance(result, str) else json.dumps(result, default=str, ensure_ascii=False)


def _schema(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the function's JSON schema, from its type hints and the `Args:` of its docstring."""
    from transformers.utils import get_json_schema
    from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

    try:
        schema: dict[str, Any] = get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException) as error:
        raise ValueError(str(error)) from error
    return schema
