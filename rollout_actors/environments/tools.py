"""Functions that the policy may call in its response, as offered by an environment.

A call is written in one of the forms that chat templates teach: one or more `<tool_call>{"name": ..., "arguments":
{...}}</tool_call>`, or a response that is such an object (`parameters` also counts as `arguments`). Results and errors
of calls become the observation: the policy learns from both.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from cluster.data.chat_template import Message
from rollout_actors.environments.protocol import Step

Run = Callable[[Callable[..., Any], Mapping[str, Any]], Awaitable[Any]]
CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
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

    def calls(self, response: str) -> list[str]:
        """Return the calls in a response, unparsed; none if the environment offers no functions."""
        if not self._functions:
            return []
        found = CALL.findall(response)
        whole = response.strip()
        return found or ([whole] if whole.startswith("{") and '"name"' in whole else [])

    async def results(self, calls: Sequence[str], run: Run) -> Step:
        """Return the results of these calls, as messages of the role `tool`.

        `run` calls a function. A ValueError, TypeError or KeyError becomes a result; other exceptions are raised.
        """
        results = [await self._result(call, run) for call in calls[:MAX_CALLS]]
        results += [f"error: more than {MAX_CALLS} calls in one response"] * (len(calls) > MAX_CALLS)
        messages: list[Message] = [{"role": "tool", "content": result[:MAX_RESULT_CHARACTERS]} for result in results]
        return Step(messages, 0.0, False, False, {})

    async def _result(self, call: str, run: Run) -> str:
        try:
            name, arguments = _parsed(call)
            if name not in self._functions:
                return f"error: no function {name!r}; the functions are {', '.join(self._functions)}"
            inspect.signature(self._functions[name]).bind(**arguments)
        except (ValueError, TypeError) as error:
            return f"error: {error}"
        try:
            return _text(await run(self._functions[name], arguments))
        except (ValueError, TypeError, KeyError) as error:
            return f"error: {type(error).__name__}: {error}"


def _parsed(call: str) -> tuple[str, dict[str, Any]]:
    """Return name and arguments of a call. Raises ValueError if it is malformed."""
    try:
        value = json.loads(call)
    except ValueError as error:
        raise ValueError(f"the call is not JSON ({error})") from error
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError('a call must be {"name": ..., "arguments": {...}}')
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(arguments, Mapping):
        raise ValueError("arguments must be an object")
    return value["name"], {str(name): argument for name, argument in arguments.items()}


def _text(result: Any) -> str:
    return result if isinstance(result, str) else json.dumps(result, default=str)


def _schema(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the function's JSON schema, from its type hints and the `Args:` of its docstring."""
    from transformers.utils import get_json_schema
    from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

    try:
        schema: dict[str, Any] = get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException) as error:
        raise ValueError(str(error)) from error
    return schema
