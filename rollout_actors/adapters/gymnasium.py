"""Adapter for Gymnasium environments with text or discrete spaces.

Observations that are texts, numbers, or tuples and dicts of them are formatted automatically, others by `render`.
Actions that are texts, numbers or named are parsed automatically, others by `parse`. Needs the package gymnasium.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster import user_code
from cluster.data.chat_template import Message
from cluster.errors import InputError
from rollout_actors.environments.protocol import numbers

SETTINGS = "environment.settings"


class GymnasiumText:
    """Runs an environment of Gymnasium: `environment.path = "gymnasium"`, with its `id` in the settings.

    `actions` names the actions of a Discrete space in order. `rules` are put before the first observation. A response
    that is not an action gets an error as observation and `malformed_reward`; the environment does not change. `render`
    and `parse` are dotted paths of `f(observation, environment) -> str` and `f(response, environment) -> action`, which
    raises ValueError if the response is not an action. Other settings are passed to `gymnasium.make`.
    """

    def __init__(
        self,
        id: str,
        *,
        actions: Sequence[str] = (),
        rules: str = "",
        malformed_reward: float = 0.0,
        render: str | None = None,
        parse: str | None = None,
        **settings: Any,
    ) -> None:
        """Raises InputError if there is no such environment, or if `render` or `parse` is missing but needed."""
        import gymnasium

        try:
            self.environment = gymnasium.make(id, **settings)
        except (gymnasium.error.Error, TypeError) as error:
            raise InputError(f"{SETTINGS}.id", f"gymnasium cannot make {id!r}: {error}") from error
        self._actions = [action.lower() for action in actions]
        self._rules = rules
        self._malformed_reward = malformed_reward
        self._render: Callable[..., str] = _load(render, "render") or _renderer(self.environment.observation_space)
        self._parse: Callable[..., Any] = _load(parse, "parse") or self._parser(self.environment.action_space)

    def reset(self, *, seed: int) -> list[Message]:
        """Return the rules and the first observation."""
        observation, _ = self.environment.reset(seed=seed)
        seen = self._render(observation, self.environment)
        return [{"role": "user", "content": f"{self._rules}\n{seen}" if self._rules else seen}]

    def step(self, response: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take the action in the response and return the result."""
        try:
            action = self._parse(response, self.environment)
        except ValueError as error:
            return str(error), self._malformed_reward, False, False, {"malformed": 1.0}
        observation, reward, terminated, truncated, info = self.environment.step(action)
        seen = self._render(observation, self.environment)
        return seen, float(reward), terminated, truncated, {**numbers(info), "final_reward": float(reward)}

    def close(self) -> None:
        """Close the environment."""
        self.environment.close()

    def _parser(self, space: Any) -> Callable[[str, Any], Any]:
        kind = type(space).__name__
        if kind == "Text":
            return lambda response, _: response
        if kind == "Discrete":
            return lambda response, _: _discrete(response, self._actions, int(space.start), int(space.n))
        raise InputError(f"{SETTINGS}.parse", f"needed, because actions of {kind} are neither texts nor numbers")


def _load(path: str | None, key: str) -> Callable[..., Any] | None:
    return user_code.load(path, f"{SETTINGS}.{key}") if path else None


def _discrete(response: str, names: Sequence[str], start: int, num: int) -> int:
    """Return the first action in the response, by name or number. Raises ValueError if there is none."""
    for word in re.findall(r"[\w-]+", response.lower()):
        if word in names:
            return start + names.index(word)
        if word.isdecimal() and start <= int(word) < start + num:
            return int(word)
    choice = ", ".join(names) if names else f"a number from {start} to {start + num - 1}"
    raise ValueError(f"answer with one of: {choice}")


def _renderer(space: Any) -> Callable[[Any, Any], str]:
    _require_text(space)
    return lambda observation, _: _formatted(observation)


def _require_text(space: Any) -> None:
    """Raise InputError unless observations of this space are texts, numbers, or collections of them."""
    kind = type(space).__name__
    if kind in ("Tuple", "Dict"):
        for part in space.spaces.values() if kind == "Dict" else space.spaces:
            _require_text(part)
    elif kind not in ("Text", "Discrete", "MultiDiscrete", "MultiBinary"):
        raise InputError(f"{SETTINGS}.render", f"needed, because observations of {kind} are neither texts nor numbers")


def _formatted(observation: Any) -> str:
    if isinstance(observation, Mapping):
        return ", ".join(f"{name}: {_formatted(part)}" for name, part in observation.items())
    if isinstance(observation, tuple):
        return ", ".join(map(_formatted, observation))
    if hasattr(observation, "tolist"):
        values = observation.tolist()
        return " ".join(map(str, values)) if isinstance(values, list) else str(values)
    return str(observation)
