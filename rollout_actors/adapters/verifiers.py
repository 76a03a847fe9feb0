"""Environments of the package verifiers, of one turn or several: their rows, what they say, and their rubric's reward.

Their own generation is never used: what the policy says is put where they look for what a model said. Needs the package
verifiers (0.1.14), which pins other packages than vLLM does: install it without its dependencies, or run it in a
process of its own with `environment.own_process`. Tools of theirs are not offered (they ask for a model's tool calls);
write such as `tools` of an environment of ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cluster import user_code
from cluster.data.chat_template import Message
from cluster.errors import InputError

SETTINGS = "environment.settings"
UNKNOWN = ("response", "tokens", "reward", "advantage")
"""What their turns hold beside what was said."""


class VerifiersText:
    """`environment.path = "rollout_actors.adapters.verifiers:VerifiersText"`, with `load` in the settings.

    `load` is the dotted path of a function that makes the environment, such as `my_env:load_environment`; the other
    settings are its arguments. The seed chooses a row of its data set, unless a column `row` of the prompts says which.
    The rubric's reward comes with the last turn, and what it measures are the parts of it. A reward function of theirs
    that raises counts as 0, by their rubric's own rule.
    """

    def __init__(self, load: str, **settings: Any) -> None:
        """Raises InputError where that is no environment of turns, or is judged by groups of responses."""
        self._environment = user_code.load(load, f"{SETTINGS}.load")(**settings)
        for name in ("env_response", "get_dataset", "init_state", "rubric"):
            if not hasattr(self._environment, name):
                raise InputError(f"{SETTINGS}.load", f"{load} gives no multi-turn environment (it has no {name})")
        if self._environment.requires_group_rollouts:
            raise InputError(f"{SETTINGS}.load", f"the rubric of {load} judges groups of responses, not single ones")
        if getattr(self._environment, "tool_defs", None):
            raise InputError(f"{SETTINGS}.load", f"{load} has tools of its own: offer them as tools of an environment")
        self._rows = self._environment.get_dataset()
        self._state: Any = None
        self._messages: list[Any] = []

    async def reset(self, *, seed: int, row: int | None = None, **_: Any) -> list[Message]:
        """The row's prompt. Columns of ours that are not `row` stay unused: its data set is its own."""
        place = (seed if row is None else row) % len(self._rows)
        given = {"example_id": place, **self._rows[place]}
        client = _no_client()
        self._state = await self._environment.init_state(given, client=client, model="policy", sampling_args={})
        self._state = await self._environment.setup_state(self._state) or self._state
        self._messages = list(self._state["prompt"])
        return _plain(self._messages)

    async def step(self, response: str) -> tuple[list[Message], float, bool, bool, dict[str, float]]:
        """What the environment says to that, or at the end the rubric's reward."""
        said = _said(response)
        turn: dict[str, Any] = {"prompt": list(self._messages), "completion": said, "extras": {}, "is_truncated": False}
        turn |= {"trajectory_id": self._state["trajectory_id"]} | dict.fromkeys(UNKNOWN)
        await self._environment.add_trajectory_step(self._state, turn)
        if await self._environment.is_completed(self._state):
            return await self._judged([])
        before = len(self._messages) + len(said)
        self._messages = list(await self._environment.get_prompt_messages(self._state))
        answer = _plain(self._messages[before:])
        if await self._environment.is_completed(self._state):
            return await self._judged(answer or _plain(self._state.get("final_env_response") or []))
        return answer, 0.0, False, False, {}

    async def _judged(self, last: list[Message]) -> tuple[list[Message], float, bool, bool, dict[str, float]]:
        state = self._state
        await self._environment.cleanup(state)
        if state.get("error") is not None:
            raise RuntimeError(f"the environment gave up: {state['error']!r}")
        await self._environment.rubric.score_rollout(state)
        is_cut = bool(state.get("is_truncated")) or state.get("stop_condition") == "max_turns_reached"
        is_cut = is_cut and self._environment.max_turns != 1
        return last, float(state["reward"]), not is_cut, is_cut, _numbers(state.get("metrics") or {})


def _no_client() -> Any:
    """In the place of the client that would generate: every state holds one, and none is asked."""
    from verifiers.clients import Client

    class NoClient(Client):  # type: ignore[misc, no-any-unimported]
        def __init__(self) -> None:
            """No connection is made."""

    NoClient.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    return NoClient()


def _said(response: str) -> list[Any]:
    """The policy's response as theirs."""
    from verifiers.types import AssistantMessage

    return [AssistantMessage(content=response)]


def _plain(messages: Sequence[Any]) -> list[Message]:
    """Their messages as ours. Raises ValueError where one is no text."""
    return [{"role": _part(message, "role"), "content": _text(_part(message, "content"))} for message in messages]


def _part(message: Any, name: str) -> Any:
    return message[name] if isinstance(message, Mapping) else getattr(message, name)


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = [_part(part, "text") for part in content if _part(part, "type") == "text"]
    if len(parts) != len(content):
        raise ValueError("a message holds something else than text")
    return "".join(parts)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    kept = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
    return {name: value for name, value in kept.items() if math.isfinite(value)}
