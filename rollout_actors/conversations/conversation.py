"""The record of a finished conversation."""

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
    """One that is over: T tokens, of which those before the first turn were given, and every turn of the policy.

    `finish_reason` is `stop` where the environment, or in a single turn the policy, ended it, and `length` where it was
    cut. `parts` are the numbers in the environment's last `info`s.
    """

    uid: str
    prompt: str
    token_ids: list[int]
    logprobs: list[float]
    """[T]: behaviour log-probabilities, 0 where others spoke."""
    segments: list[Segment]
    turns: list[Turn]
    finish_reason: str
    response: str = ""
    """The policy's last response, where its text is known."""
    messages: list[Message] = field(default_factory=list)
    """The whole conversation; nothing for a single turn."""
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def mask(self) -> list[bool]:
        """[T]: true on what the policy sampled."""
        mask = [False] * len(self.token_ids)
        for turn in self.turns:
            mask[turn.start : turn.start + turn.length] = [True] * turn.length
        return mask

    @property
    def last_response(self) -> list[int]:
        """The tokens of the policy's last turn."""
        turn = self.turns[-1]
        return self.token_ids[turn.start : turn.start + turn.length]

    @property
    def turn_rewards(self) -> float:
        """What the environment gave, all turns together."""
        return sum(turn.reward or 0.0 for turn in self.turns)


def single_turn(prompt: str, prompt_token_ids: Sequence[int], response: SampledResponse) -> Conversation:
    """One response to one prompt: P prompt tokens, then N sampled ones."""
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
    """What a scorer is asked: the last response, with the row's columns and, where there is one, the conversation."""
    columns = scorer_columns(row)
    if conversation.messages:
        columns["conversation"] = conversation.messages
    return ScoreRequest(conversation.uid, conversation.prompt, response, columns, task)


def environment_seed(what: str) -> int:
    """The seed of an environment: the first 31 bits of blake2b over ``WHAT:environment``.

    In training WHAT is `{run seed}-{group}`: all responses of a group meet the same beginning.
    """
    digest = hashlib.blake2b(f"{what}:environment".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
