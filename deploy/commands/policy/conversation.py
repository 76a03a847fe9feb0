"""A chat with the policy: what was said stays as the tokens that were sampled."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any, Protocol

from cluster.data.chat_template import require_template
from cluster.trajectory import segment_seed
from deploy.config.schema import RunConfig
from rollout_actors.config import max_sequence_tokens
from rollout_actors.conversations.transcript import Transcript
from rollout_actors.engine.protocol import SamplingRequest
from rollout_actors.prompts import PromptTokenizer


class Completes(Protocol):
    """The method of a rollout actor that continues tokens."""

    def complete(self, requests: Sequence[SamplingRequest], *, with_options: bool) -> Awaitable[list[list[int]]]: ...


class ChatConversation:
    """One conversation between a person and the policy, in the policy's chat template.

    Starts anew if it has no room for another answer. Raises InputError if the policy has no chat template.
    """

    def __init__(self, config: RunConfig, policy: Path, tokenizer: PromptTokenizer | None = None) -> None:
        actors = config.rollout_actors
        self._max_tokens = max_sequence_tokens(actors, [task.environment for task in config.by_task().values()])
        self._max_response_tokens, self._temperature = actors.max_response_tokens, actors.temperature
        self._tokenizer = tokenizer or PromptTokenizer(
            str(policy),
            max_prompt_tokens=max(actors.max_prompt_tokens, self._max_tokens - 1),
            keep_special_tokens=actors.keep_special_tokens,
            stop=actors.stop,
        )
        require_template(self._tokenizer.tokenizer, str(policy))
        self._transcript: Transcript | None = None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What was said so far."""
        return self._transcript.messages if self._transcript is not None else []

    def forget(self) -> None:
        """Start a new conversation."""
        self._transcript = None

    def say(self, text: str) -> bool:
        """Append a message of the user. Returns whether the conversation had to start anew to have room for it."""
        message = {"role": "user", "content": text}
        if self._transcript is not None:
            self._transcript.observe([message])
            if self._room() > 0:
                return False
        is_new = self._transcript is None
        self._transcript = Transcript(self._tokenizer, [message])
        return not is_new

    def _room(self) -> int:
        used = len(self._transcript.token_ids) if self._transcript is not None else 0
        return min(self._max_response_tokens, self._max_tokens - used)

    async def answer(self, actor: Completes, seed: str) -> str:
        """Sample the policy's answer, append it and return its text."""
        assert self._transcript is not None
        request = SamplingRequest(
            seed, list(self._transcript.token_ids), self._room(), segment_seed(seed, 0), self._temperature
        )
        (token_ids,) = await actor.complete([request], with_options=True)
        return self._transcript.respond(token_ids)
