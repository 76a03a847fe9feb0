"""What an environment is, and what it must give back: text in, text out, with Gymnasium's meaning.

A response of the policy goes in, an observation and a reward come out. What breaks the protocol is an EnvironmentFault
that names the environment's file and line. Knows neither tokens, engines nor tickets.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from cluster import user_code
from cluster.data.chat_template import Message
from cluster.errors import AntiphonError, EnvironmentFault
from cluster.user_code import line_that_raised, place_of

Observation = str | Sequence[Message]
"""A text, or messages with role and content. The answer to messages may be a text: it is the user's then."""
PATH_KEY = "environment.path"
STEP = "(observation, reward, terminated, truncated, info)"


class Environment(Protocol):
    """What a task brings. Both methods may be `async`; one object plays one conversation at a time, after another.

    `reset` begins a conversation. Everything random in it comes from `seed`: the same seed and the same responses give
    the same conversation. `columns` are those of the prompt's data row, where the task has data.
    `step` takes the policy's response: `observation` is what the policy reads next, `reward` what the response was
    worth, `terminated` and `truncated` end the conversation (the second where it was cut), and the numbers in `info`
    are kept as parts of the reward. `tools`, where there is such a method, lists functions that the policy may call.
    """

    def reset(self, *, seed: int, **columns: Any) -> Any: ...
    def step(self, response: str) -> Any: ...


class Step(NamedTuple):
    """What a response led to. `info` holds numbers alone."""

    observation: Observation
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, float]


def raised(method: Callable[..., Any], error: BaseException) -> EnvironmentFault:
    """The fault that a method's own exception is, at the line that raised it."""
    where = line_that_raised(method, error, caller=__file__)
    return EnvironmentFault(where, f"{method.__name__} raised {type(error).__name__}: {error}")


def checked_start(method: Callable[..., Any], value: Any) -> Observation:
    """What `reset` gave. Raises EnvironmentFault where it is no text and no messages, or empty."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Mapping):
        value = value[0]
    return _observation(method, "reset", "messages or a text", value, may_be_empty=False)


def checked_step(method: Callable[..., Any], value: Any) -> Step:
    """What `step` gave. Raises EnvironmentFault where it is no five values of their kinds."""
    if not isinstance(value, tuple | list) or len(value) != 5:
        raise _fault(method, "step", STEP, value)
    observation, reward, terminated, truncated, info = value
    if not isinstance(reward, numbers.Real) or not math.isfinite(float(reward)):
        raise _fault(method, "step", "a finite reward", reward)
    for name, flag in (("terminated", terminated), ("truncated", truncated)):
        if not (isinstance(flag, bool) or type(flag).__name__ in ("bool", "bool_")):
            raise _fault(method, "step", f"{name} to be true or false", flag)
    if not isinstance(info, Mapping):
        raise _fault(method, "step", "info to be a mapping", info)
    ends = bool(terminated or truncated)
    seen = _observation(method, "step", "an observation of messages or a text", observation, may_be_empty=ends)
    return Step(seen, float(reward), bool(terminated), bool(truncated), _numbers(info))


def _numbers(info: Mapping[Any, Any]) -> dict[str, float]:
    kept = {str(name): float(value) for name, value in info.items() if isinstance(value, numbers.Real)}
    return {name: value for name, value in kept.items() if math.isfinite(value)}


def _observation(
    method: Callable[..., Any], name: str, expected: str, value: Any, *, may_be_empty: bool
) -> Observation:
    if isinstance(value, str) and (value or may_be_empty):
        return value
    if isinstance(value, list | tuple) and (value or may_be_empty) and all(map(_is_message, value)):
        return [dict(message) for message in value]
    raise _fault(method, name, expected, value)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _fault(method: Callable[..., Any], name: str, expected: str, value: Any) -> EnvironmentFault:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:80] + "…"
    return EnvironmentFault(place_of(method), f"{name} must give {expected}, not {shown}")


def made(path: str, settings: Mapping[str, Any]) -> Any:
    """The environment at that dotted path. Raises InputError, or EnvironmentFault where making it fails."""
    make = user_code.load(path, PATH_KEY)
    try:
        environment = make(**settings)
    except AntiphonError:
        raise
    except Exception as error:
        raise raised(make, error) from error
    for name in ("reset", "step"):
        if not callable(getattr(environment, name, None)):
            raise EnvironmentFault(place_of(make), f"has no method {name}: an environment has reset and step")
    return environment
