"""The protocol of environments, which is Gymnasium's with texts, and checks of what they return.

`step` receives a response and returns an observation and a reward. A violation is an EnvironmentFault with the
environment's file and line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple, Protocol

from cluster.data.chat_template import Message
from cluster.data.unicode_text import as_unicode
from cluster.errors import AntiphonError, EnvironmentFault
from cluster.user_code import line_that_raised, place_of
from rollout_actors.config import ADAPTERS

Observation = str | Sequence[Message]
"""A text, or messages with role and content. A text after messages is a message of the user."""
PATH_KEY = "environment.path"
STEP = "(observation, reward, terminated, truncated, info)"


class Environment(Protocol):
    """The environment of a task.

    Methods may be `async`. One object runs one conversation at a time, many in turn.
    `reset` starts a conversation and returns the first observation. All randomness must come from `seed`: the same seed
    and responses give the same conversation. `columns` are the columns of the prompt's data row, if there is data: a
    copy for each conversation, without a column named seed.
    `step` takes the policy's response. It returns the next observation, the reward of the response, `terminated`,
    `truncated` (both end the conversation; the second if it was cut off) and `info`, whose numbers are recorded as
    parts of the reward. An optional method `tools` returns functions that the policy may call.
    """

    def reset(self, *, seed: int, **columns: Any) -> Any: ...
    def step(self, response: str) -> Any: ...


class Step(NamedTuple):
    """The result of a response. `info` contains only numbers."""

    observation: Observation
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, float]


def fault_of(method: Callable[..., Any], error: BaseException) -> EnvironmentFault:
    """Return the EnvironmentFault for an exception of a method, with the line that raised it."""
    where = line_that_raised(method, error, caller=__file__)
    return EnvironmentFault(where, f"{method.__name__} raised {type(error).__name__}: {error}")


def checked_start(method: Callable[..., Any], value: Any) -> Observation:
    """Return the observation of `reset`.

    Raises EnvironmentFault unless it is a text or messages, and not empty.
    """
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Mapping):
        value = value[0]
    return _observation(method, "reset", "messages or a text", value, may_be_empty=False)


def checked_step(method: Callable[..., Any], value: Any) -> Step:
    """Return the result of `step`. Raises EnvironmentFault unless it is five values of the right types."""
    if not isinstance(value, tuple | list) or len(value) != 5:
        raise _fault(method, "step", STEP, value)
    observation, reward, terminated, truncated, info = value
    if not isinstance(reward, Real) or not math.isfinite(float(reward)):
        raise _fault(method, "step", "a finite reward", reward)
    for name, flag in (("terminated", terminated), ("truncated", truncated)):
        if not (isinstance(flag, bool) or type(flag).__name__ in ("bool", "bool_")):
            raise _fault(method, "step", f"{name} to be true or false", flag)
    if not isinstance(info, Mapping):
        raise _fault(method, "step", "info to be a mapping", info)
    ends = bool(terminated or truncated)
    seen = _observation(method, "step", "an observation of messages or a text", observation, may_be_empty=ends)
    return Step(seen, float(reward), bool(terminated), bool(truncated), numbers(info))


def numbers(info: Mapping[Any, Any]) -> dict[str, float]:
    """Return the entries that are finite numbers, as floats."""
    kept = {as_unicode(str(name)): float(value) for name, value in info.items() if isinstance(value, Real)}
    return {name: value for name, value in kept.items() if math.isfinite(value)}


def _observation(
    method: Callable[..., Any], name: str, expected: str, value: Any, *, may_be_empty: bool
) -> Observation:
    if isinstance(value, str) and (value or may_be_empty):
        return value
    if isinstance(value, list | tuple) and (value or may_be_empty) and all(map(_is_message, value)):
        return [{**message, "content": message.get("content") or ""} for message in value]
    raise _fault(method, name, expected, value)


def _is_message(value: Any) -> bool:
    """Return whether the value is a message; one with calls of functions may have no content."""
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        return False
    content = value.get("content")
    return isinstance(content, str) or (content is None and bool(value.get("tool_calls")))


def _fault(method: Callable[..., Any], name: str, expected: str, value: Any) -> EnvironmentFault:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:80] + "…"
    return EnvironmentFault(place_of(method), f"{name} must return {expected}, not {shown}")


def make_environment(path: str, settings: Mapping[str, Any]) -> Any:
    """Make the environment at a dotted path, or of an adapter's name.

    Raises InputError if there is none at `path`, EnvironmentFault if making it fails.
    """
    make = ADAPTERS.find(path, key=PATH_KEY)
    try:
        environment = make(**settings)
    except AntiphonError:
        raise
    except Exception as error:  # whatever the user's code raises is reported with its line
        raise fault_of(make, error) from error
    for name in ("reset", "step"):
        if not callable(getattr(environment, name, None)):
            raise EnvironmentFault(place_of(make), f"has no method {name}: an environment needs reset and step")
    return environment
