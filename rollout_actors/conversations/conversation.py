"""A finished conversation, its scorer request and its seed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.data.chat_template import Message
from cluster.scoring import ScoreRequest
from cluster.trajectory import Segment, Turn
from rollout_actors.engine.response import SampledResponse, shifted
from rollout_actors.prompts import scorer_columns


@dataclass(frozen=True, slots=True)
class Conversation:
    """A finished conversation: T tokens and the policy's turns.

    The tokens before the first turn are the prompt.
    `finish_reason` is `stop` if the environment (in a single turn: the policy) ended it, `length` if it was cut off.
    `parts` are the numbers from the `info` of all steps; of numbers with the same name, the last.
    """

    uid: str
    prompt: str
    token_ids: list[int]
    logprobs: list[float]
    """[T]: behaviour log-probabilities; 0 on tokens that the policy did not sample."""
    segments: list[Segment]
    turns: list[Turn]
    finish_reason: str
    response: str = ""
    """Text of the policy's last response; empty if it was not decoded."""
    messages: list[Message] = field(default_factory=list)
    """All messages of the conversation; empty for a single turn."""
    parts: Mapping[str, float] = field(default_factory=dict)
    sequence_starts: list[int] = field(default_factory=list)
    """Starts of the sequences after the first: one a turn if the history is rendered anew."""

    @property
    def mask(self) -> list[bool]:
        """[T]: true on tokens that the policy sampled."""
        mask = [False] * len(self.token_ids)
        for turn in self.turns:
            mask[turn.start : turn.start + turn.length] = [True] * turn.length
        return mask

    @property
    def last_response(self) -> list[int]:
        """Token ids of the policy's last turn."""
        turn = self.turns[-1]
        return self.token_ids[turn.start : turn.start + turn.length]

    @property
    def completion_ids(self) -> list[int]:
        """Token ids after the prompt, or those of all turns if the history is rendered anew."""
        if self.sequence_starts:
            return [token for token, is_sampled in zip(self.token_ids, self.mask, strict=True) if is_sampled]
        return self.token_ids[self.turns[0].start :]

    @property
    def last_context(self) -> list[int]:
        """Token ids before the policy's last turn."""
        return self.token_ids[: self.turns[-1].start]

    @property
    def sequences(self) -> list[list[int]]:
        """Token ids of each sequence; most conversations are one."""
        ends = [*self.sequence_starts, len(self.token_ids)]
        return [self.token_ids[start:end] for start, end in zip([0, *self.sequence_starts], ends, strict=True)]

    @property
    def turn_rewards(self) -> float:
        """Sum of the environment's rewards over all turns."""
        return sum(turn.reward or 0.0 for turn in self.turns)


def single_turn(prompt: str, prompt_token_ids: Sequence[int], response: SampledResponse) -> Conversation:
    """Return the conversation of one prompt (P tokens) and one response (N tokens)."""
    num = len(prompt_token_ids)
    return Conversation(
        response.uid,
        prompt,
        [*prompt_token_ids, *response.token_ids],
        [0.0] * num + response.logprobs,
        shifted(response.segments, num),
        [Turn(num, len(response.token_ids))],
        response.finish_reason,
    )


def score_request(conversation: Conversation, response: str, row: Mapping[str, Any], *, task: str = "") -> ScoreRequest:
    """Return the scorer's request: last response, the row's columns and what the scorer may need besides.

    Adds the columns `completion_ids`, the tokens after the prompt; `finish_reason`, `stop` or `length`; `messages`, the
    prompt as messages, if it has any; and `conversation`, all messages of a conversation with an environment.
    """
    prompt_messages = getattr(conversation.prompt, "messages", ())
    columns = {
        **scorer_columns(row),
        **({"messages": list(prompt_messages)} if prompt_messages else {}),
        **({"conversation": conversation.messages} if conversation.messages else {}),
        "completion_ids": conversation.completion_ids,
        "finish_reason": conversation.finish_reason,
    }
    return ScoreRequest(conversation.uid, conversation.prompt, response, columns, task)


def environment_seed(key: str) -> int:
    """Return the seed of an environment: the first 31 bits of blake2b over ``KEY:environment``.

    In training KEY is `{run seed}-{group}`, so all responses of a group start from the same state.
    """
    digest = hashlib.blake2b(f"{key}:environment".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
