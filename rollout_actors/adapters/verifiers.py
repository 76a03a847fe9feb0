"""Adapter for single-turn and multi-turn environments of the package verifiers.

Uses their rows and rubrics, but not their generation: the policy's responses are put where a model's would be. Needs
the package verifiers (0.1.14), whose dependencies conflict with vLLM's: install it without them, or set
`environment.own_process`. Environments with tools are refused, because verifiers needs a model's tool calls for them:
offer the functions as `tools` of your own environment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster import user_code
from cluster.data.chat_template import Message
from cluster.errors import InputError
from rollout_actors.environments.protocol import numbers

SETTINGS = "environment.settings"
UNKNOWN = ("response", "tokens", "reward", "advantage")
"""Fields of a turn in verifiers that only its own generation could fill."""


class VerifiersText:
    """Runs an environment of verifiers: `environment.path = "verifiers"`, with `load` in the settings.

    `load` is the dotted path of a function that makes the environment, such as `my_env:load_environment`; the other
    settings are its arguments. The seed selects a row of the environment's data set, unless the prompts have a column
    `row` with its number. The last turn gets the rubric's reward, with the rubric's metrics as parts. By the rule of
    the rubric, a reward function that raises counts as 0.
    """

    def __init__(self, load: str, **settings: Any) -> None:
        """Raises InputError if that is not a multi-turn environment, scores whole groups, or has tools."""
        self._environment = user_code.load(load, f"{SETTINGS}.load")(**settings)
        for name in ("env_response", "get_dataset", "init_state", "rubric"):
            if not hasattr(self._environment, name):
                raise InputError(
                    f"{SETTINGS}.load", f"{load} does not return a multi-turn environment (it has no {name})"
                )
        if self._environment.requires_group_rollouts:
            raise InputError(f"{SETTINGS}.load", f"the rubric of {load} scores groups of responses, not single ones")
        if getattr(self._environment, "tool_defs", None):
            raise InputError(f"{SETTINGS}.load", f"{load} has tools: offer them as `tools` of your own environment")
        self._rows = self._environment.get_dataset()
        self._state: Any = None
        self._messages: list[Any] = []

    async def reset(self, *, seed: int, row: int | None = None, **_: Any) -> list[Message]:
        """Return the prompt of a row. Only the column `row` is used: the environment has its own data set."""
        index = (seed if row is None else row) % len(self._rows)
        example = {"example_id": index, **self._rows[index]}
        client = _no_client()
        self._state = await self._environment.init_state(example, client=client, model="policy", sampling_args={})
        self._state = await self._environment.setup_state(self._state) or self._state
        self._messages = list(self._state["prompt"])
        return _plain(self._messages)

    async def step(self, response: str) -> tuple[list[Message], float, bool, bool, dict[str, float]]:
        """Return the environment's answer, and the rubric's reward if the conversation ends."""
        completion = _completion(response)
        turn: dict[str, Any] = {
            "prompt": list(self._messages),
            "completion": completion,
            "extras": {},
            "is_truncated": False,
        }
        turn |= {"trajectory_id": self._state["trajectory_id"]} | dict.fromkeys(UNKNOWN)
        await self._environment.add_trajectory_step(self._state, turn)
        if await self._environment.is_completed(self._state):
            return await self._scored([])
        before = len(self._messages) + len(completion)
        self._messages = list(await self._environment.get_prompt_messages(self._state))
        answer = _plain(self._messages[before:])
        if await self._environment.is_completed(self._state):
            return await self._scored(answer or _plain(self._state.get("final_env_response") or []))
        return answer, 0.0, False, False, {}

    async def _scored(self, last: list[Message]) -> tuple[list[Message], float, bool, bool, dict[str, float]]:
        state = self._state
        await self._environment.cleanup(state)
        if state.get("error") is not None:
            raise RuntimeError(f"the environment failed: {state['error']!r}")
        await self._environment.rubric.score_rollout(state)
        is_cut = bool(state.get("is_truncated")) or state.get("stop_condition") == "max_turns_reached"
        is_cut = is_cut and self._environment.max_turns != 1
        return last, float(state["reward"]), not is_cut, is_cut, numbers(state.get("metrics") or {})


def _no_client() -> Any:
    """Return a client that is never called: a state of verifiers must contain one."""
    from verifiers.clients import Client

    class NoClient(Client):  # type: ignore[misc, no-any-unimported]
        def __init__(self) -> None:
            """Open no connection."""

    NoClient.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    return NoClient()


def _completion(response: str) -> list[Any]:
    """Return the policy's response as messages of verifiers."""
    from verifiers.types import AssistantMessage

    return [AssistantMessage(content=response)]


def _plain(messages: Sequence[Any]) -> list[Message]:
    """Convert messages of verifiers to plain ones.

    Raises ValueError if one contains something other than text.
    """
    return [{"role": _part(message, "role"), "content": _text(_part(message, "content"))} for message in messages]


def _part(message: Any, name: str) -> Any:
    return message[name] if isinstance(message, Mapping) else getattr(message, name)


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = [_part(part, "text") for part in content if _part(part, "type") == "text"]
    if len(parts) != len(content):
        raise ValueError("a message contains something other than text")
    return "".join(parts)
