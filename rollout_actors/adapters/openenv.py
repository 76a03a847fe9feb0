"""Any environment behind an OpenEnv server, in text: a session of its own over the server's WebSocket.

Speaks OpenEnv's contract (`reset`, `step` and `state` on `/ws`) by itself and needs the package websockets alone: the
package openenv, which the server runs with, asks for another mcp than vLLM does, so both do not fit in one place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from cluster.data.chat_template import Message
from cluster.errors import EnvironmentFault, InputError

SETTINGS = "environment.settings"
INVALID = ("VALIDATION_ERROR", "INVALID_JSON")
"""What a server says of an action that is none; other errors are faults of its own."""
MAX_MESSAGE_BYTES = 2**26


class OpenEnvText:
    """`environment.path = "rollout_actors.adapters.openenv:OpenEnvText"`, with the server's `url` in the settings.

    A response is the field `action` of the action, or the whole action in JSON where that is empty. The policy reads
    the field `observation` of what is observed, or all of it in JSON. `rules` go before the first observation. An
    answer that is no action is told so, costs `malformed_reward`, and moves nothing. Numbers in the server's last state
    are parts of the reward. The server must allow as many sessions as conversations are held at once.
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
        """Raises InputError where `url` is none of a server."""
        scheme, found, rest = url.rstrip("/").partition("://")
        if not found or scheme not in ("http", "https", "ws", "wss"):
            raise InputError(f"{SETTINGS}.url", f"{url!r} is not a server's, such as http://127.0.0.1:8000")
        self._url = f"{'wss' if scheme in ('https', 'wss') else 'ws'}://{rest}/ws"
        self._action = action
        self._observation = observation
        self._rules = rules
        self._malformed_reward = malformed_reward
        self._connect_timeout_s = connect_timeout_s
        self._socket: Any = None

    async def reset(self, *, seed: int, **columns: Any) -> list[Message]:
        """The rules and what is observed first. The server takes of the columns those that its reset knows."""
        if self._socket is None or self._socket.state.name != "OPEN":
            await self._connect()
        answer = await self._ask("reset", {**columns, "seed": seed})
        seen = self._shown(answer)
        return [{"role": "user", "content": f"{self._rules}\n{seen}" if self._rules else seen}]

    async def step(self, response: str) -> tuple[str, float, bool, bool, dict[str, float]]:
        """What is observed after the action that the response says."""
        try:
            answer = await self._ask("step", self._parsed(response))
        except ValueError as error:
            return f"error: {error}", self._malformed_reward, False, False, {"malformed": 1.0}
        is_over = bool(answer.get("done"))
        state = await self._ask("state") if is_over else {}
        return self._shown(answer), float(answer.get("reward") or 0.0), is_over, False, _numbers(state)

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

    async def _ask(self, kind: str, data: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What the server answers. Raises ValueError where an action is none, EnvironmentFault for anything else."""
        from websockets.exceptions import WebSocketException

        message = {"type": kind} if data is None else {"type": kind, "data": data}
        try:
            await self._socket.send(json.dumps(message))
            answer = json.loads(await self._socket.recv())
        except (WebSocketException, ValueError, TypeError) as error:
            raise EnvironmentFault(self._url, f"{kind}: {type(error).__name__}: {error}") from error
        said = answer.get("data", {}) if isinstance(answer, Mapping) else {}
        if not isinstance(said, dict) or "type" not in answer:
            raise EnvironmentFault(self._url, f"{kind}: the answer is not of OpenEnv's contract")
        if answer["type"] == "error" and kind == "step" and said.get("code") in INVALID:
            raise ValueError(_reasons(said))
        if answer["type"] == "error":
            raise EnvironmentFault(self._url, f"{kind}: {said.get('code')}: {said.get('message')}")
        return said

    def _parsed(self, response: str) -> dict[str, Any]:
        """The action that a response is. Raises ValueError for none."""
        if self._action:
            return {self._action: response}
        try:
            action = json.loads(response)
        except ValueError as error:
            raise ValueError(f"the action is no JSON ({error})") from error
        if not isinstance(action, dict):
            raise ValueError("the action is no JSON object")
        return action

    def _shown(self, answer: Mapping[str, Any]) -> str:
        observed = answer.get("observation") or {}
        if not self._observation:
            return json.dumps(observed)
        if self._observation not in observed:
            what = f"no {self._observation!r} in what is observed; there is {', '.join(observed) or 'nothing'}"
            raise EnvironmentFault(f"{SETTINGS}.observation", what)
        value = observed[self._observation]
        return value if isinstance(value, str) else json.dumps(value)


def _reasons(said: Mapping[str, Any]) -> str:
    """What is wrong with an action, field by field where the server says so."""
    errors = said.get("errors")
    if not isinstance(errors, list):
        return str(said.get("message"))
    return "; ".join(f"{'.'.join(map(str, error.get('loc', ())))}: {error.get('msg')}" for error in errors)


def _numbers(state: Mapping[str, Any]) -> dict[str, float]:
    kept = {name: float(value) for name, value in state.items() if isinstance(value, int | float)}
    return {name: value for name, value in kept.items() if math.isfinite(value)}
