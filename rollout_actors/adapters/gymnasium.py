"""Any Gymnasium environment with text or discrete spaces, in text.

What it shows is written by `render`, or by itself where its observations are texts, numbers, or tuples and dicts of
such; what the policy says is read by `parse`, or by itself where actions are texts, numbers or have names. Needs the
package gymnasium.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster import user_code
from cluster.data.chat_template import Message
from cluster.errors import InputError

SETTINGS = "environment.settings"


class GymnasiumText:
    """Set `environment.path = "rollout_actors.adapters.gymnasium:GymnasiumText"` and the environment's `id`.

    `actions` names a Discrete space's actions in order. `rules` go before the first observation. An answer that is no
    action is told so, costs `malformed_reward`, and moves nothing. `render` and `parse` are dotted paths of
    `f(observation, environment) -> str` and `f(response, environment) -> action`, which raises ValueError for none.
    Other settings go to `gymnasium.make`.
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
        """Raises InputError where there is no such environment, or where `render` or `parse` is needed and missing."""
        import gymnasium

        try:
            self.environment = gymnasium.make(id, **settings)
        except (gymnasium.error.Error, TypeError) as error:
            raise InputError(f"{SETTINGS}.id", f"gymnasium makes no {id!r}: {error}") from error
        self._actions = [action.lower() for action in actions]
        self._rules = rules
        self._malformed_reward = malformed_reward
        self._render: Callable[..., str] = _own(render, "render") or _renderer(self.environment.observation_space)
        self._parse: Callable[..., Any] = _own(parse, "parse") or self._parser(self.environment.action_space)

    def reset(self, *, seed: int) -> list[Message]:
        """The rules and what is seen first."""
        observation, _ = self.environment.reset(seed=seed)
        seen = self._render(observation, self.environment)
        return [{"role": "user", "content": f"{self._rules}\n{seen}" if self._rules else seen}]

    def step(self, response: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """What is seen after the action that the response says."""
        try:
            action = self._parse(response, self.environment)
        except ValueError as error:
            return str(error), self._malformed_reward, False, False, {"malformed": 1.0}
        observation, reward, terminated, truncated, info = self.environment.step(action)
        seen = self._render(observation, self.environment)
        return seen, float(reward), terminated, truncated, {**_numbers(info), "final_reward": float(reward)}

    def close(self) -> None:
        """Give back what the environment holds."""
        self.environment.close()

    def _parser(self, space: Any) -> Callable[[str, Any], Any]:
        kind = type(space).__name__
        if kind == "Text":
            return lambda response, _: response
        if kind == "Discrete":
            return lambda response, _: _discrete(response, self._actions, int(space.start), int(space.n))
        raise InputError(f"{SETTINGS}.parse", f"needed: actions of {kind} are neither texts nor numbers")


def _own(path: str | None, key: str) -> Callable[..., Any] | None:
    return user_code.load(path, f"{SETTINGS}.{key}") if path else None


def _numbers(info: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in info.items() if isinstance(value, int | float)}


def _discrete(response: str, names: Sequence[str], start: int, num: int) -> int:
    """The action that a response names, by its number or by the first name in it. Raises ValueError for none."""
    said = re.findall(r"[\w-]+", response.lower())
    for word in said:
        if word in names:
            return start + names.index(word)
        if word.isdecimal() and start <= int(word) < start + num:
            return int(word)
    choice = ", ".join(names) if names else f"a number from {start} to {start + num - 1}"
    raise ValueError(f"say one of: {choice}")


def _renderer(space: Any) -> Callable[[Any, Any], str]:
    _require_text(space)
    return lambda observation, _: _shown(observation)


def _require_text(space: Any) -> None:
    """Raise InputError where observations of this space are no texts, numbers, or collections of such."""
    kind = type(space).__name__
    if kind in ("Tuple", "Dict"):
        for part in space.spaces.values() if kind == "Dict" else space.spaces:
            _require_text(part)
    elif kind not in ("Text", "Discrete", "MultiDiscrete", "MultiBinary"):
        raise InputError(f"{SETTINGS}.render", f"needed: observations of {kind} are neither texts nor numbers")


def _shown(observation: Any) -> str:
    if isinstance(observation, Mapping):
        return ", ".join(f"{name}: {_shown(part)}" for name, part in observation.items())
    if isinstance(observation, tuple):
        return ", ".join(map(_shown, observation))
    if hasattr(observation, "tolist"):
        values = observation.tolist()
        return " ".join(map(str, values)) if isinstance(values, list) else str(values)
    return str(observation)
