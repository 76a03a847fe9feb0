"""Adapter for environments behind an OpenEnv server, with one WebSocket session per environment.

Implements OpenEnv's protocol (`reset`, `step` and `state` on `/ws`) and needs only the package websockets. The package
openenv, with which the server runs, requires another version of mcp than vLLM and cannot be installed beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cluster.data.chat_template import Message
from cluster.errors import EnvironmentFault, InputError
from rollout_actors.environments.protocol import numbers

SETTINGS = "environment.settings"
INVALID = ("VALIDATION_ERROR", "INVALID_JSON")
"""Error codes for an invalid action. All other errors are faults of the server."""
MAX_MESSAGE_BYTES = 2**26


class OpenEnvText:
    """Runs an environment of a server: `environment.path = "openenv"`, with its `url` in the settings.

    The response becomes the field `action` of the action, or is the whole action in JSON if `action` is empty. The
    policy reads the field `observation` of the observation, or all of it in JSON if `observation` is empty. `rules` are
    put before the first observation. A response that is not an action gets an error as observation and
    `malformed_reward`; the environment does not change. Numbers in the server's last state become parts of the reward.
    The server must allow one session for each concurrent conversation.
    """

    def __init__(
        self,
        url: str,
        *,
        action: str = "message",
        observation: str = "",
        rules: str = "",
        malformed_reward: float = 0.0,
        connect_timeout_s: float = 10.0,
    ) -> None:
        """Raises InputError if `url` is not the URL of a server."""
        scheme, found, rest = url.rstrip("/").partition("://")
        if not found or scheme not in ("http", "https", "ws", "wss"):
            raise InputError(f"{SETTINGS}.url", f"{url!r} is not the URL of a server, such as http://127.0.0.1:8000")
        self._url = f"{'wss' if scheme in ('https', 'wss') else 'ws'}://{rest}/ws"
        self._action = action
        self._observation = observation
        self._rules = rules
        self._malformed_reward = malformed_reward
        self._connect_timeout_s = connect_timeout_s
        self._socket: Any = None

    async def reset(self, *, seed: int, **columns: Any) -> list[Message]:
        """Return the rules and the first observation.

        The server's reset uses those columns that it has arguments for.
        """
        if self._socket is None or self._socket.state.name != "OPEN":
            await self._connect()
        answer = await self._call("reset", {**columns, "seed": seed})
        seen = self._formatted(answer)
        return [{"role": "user", "content": f"{self._rules}\n{seen}" if self._rules else seen}]

    async def step(self, response: str) -> tuple[str, float, bool, bool, dict[str, float]]:
        """Take the action in the response and return the result."""
        try:
            answer = await self._call("step", self._parsed(response))
        except ValueError as error:
            return f"error: {error}", self._malformed_reward, False, False, {"malformed": 1.0}
        is_over = bool(answer.get("done"))
        state = await self._call("state") if is_over else {}
        return self._formatted(answer), float(answer.get("reward") or 0.0), is_over, False, numbers(state)

    async def close(self) -> None:
        """End the session."""
        socket, self._socket = self._socket, None
        if socket is not None:
            await socket.close()

    async def _connect(self) -> None:
        from websockets.asyncio.client import connect
        from websockets.exceptions import WebSocketException

        try:
            self._socket = await connect(
                self._url, open_timeout=self._connect_timeout_s, max_size=MAX_MESSAGE_BYTES, proxy=None
            )
        except (OSError, TimeoutError, WebSocketException) as error:
            raise EnvironmentFault(self._url, f"cannot be reached ({error})") from error

    async def _call(self, kind: str, data: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the server's answer.

        Raises ValueError for an invalid action, EnvironmentFault for all other errors.
        """
        from websockets.exceptions import WebSocketException

        message = {"type": kind} if data is None else {"type": kind, "data": data}
        try:
            await self._socket.send(json.dumps(message))
            answer = json.loads(await self._socket.recv())
        except (WebSocketException, ValueError, TypeError) as error:
            raise EnvironmentFault(self._url, f"{kind}: {type(error).__name__}: {error}") from error
        content = answer.get("data", {}) if isinstance(answer, Mapping) else {}
        if not isinstance(content, dict) or "type" not in answer:
            raise EnvironmentFault(self._url, f"{kind}: the answer does not follow OpenEnv's protocol")
        if answer["type"] == "error" and kind == "step" and content.get("code") in INVALID:
            raise ValueError(_reasons(content))
        if answer["type"] == "error":
            raise EnvironmentFault(self._url, f"{kind}: {content.get('code')}: {content.get('message')}")
        return content

    def _parsed(self, response: str) -> dict[str, Any]:
        """Return the action in a response. Raises ValueError if there is none."""
        if self._action:
            return {self._action: response}
        try:
            action = json.loads(response)
        except ValueError as error:
            raise ValueError(f"the action is not JSON ({error})") from error
        if not isinstance(action, dict):
            raise ValueError("the action is not a JSON object")
        return action

    def _formatted(self, answer: Mapping[str, Any]) -> str:
        observed = answer.get("observation") or {}
        if not self._observation:
            return json.dumps(observed, ensure_ascii=False)
        if self._observation not in observed:
            what = f"the observation has no field {self._observation!r}; it has {', '.join(observed) or 'none'}"
            raise EnvironmentFault(f"{SETTINGS}.observation", what)
        value = observed[self._observation]
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _reasons(content: Mapping[str, Any]) -> str:
    """Return why an action is invalid, by field if the server gives the fields."""
    errors = content.get("errors")
    if not isinstance(errors, list):
        return str(content.get("message"))
    return "; ".join(f"{'.'.join(map(str, error.get('loc', ())))}: {error.get('msg')}" for error in errors)
