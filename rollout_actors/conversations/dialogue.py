"""Runs conversations between the policy and an environment, turn by turn.

The mask is true on the policy's tokens and false on all others. A prompt without an environment needs none of this: see
`single_turn`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from cluster.errors import EnvironmentFault
from cluster.trajectory import PartialResponse, Segment, Turn
from rollout_actors.config import EnvironmentConfig
from rollout_actors.conversations.conversation import Conversation
from rollout_actors.conversations.transcript import Transcript
from rollout_actors.engine.response import SampledResponse, shifted
from rollout_actors.environments.host import Host
from rollout_actors.environments.protocol import Step
from rollout_actors.prompts import PromptTokenizer
from rollout_actors.tool_calls import ResponseParser

CHANGED_ANSWER = "gave another answer than before to the same responses: take all randomness from the seed"


ParserFor = Callable[[Sequence[Mapping[str, Any]]], Awaitable[ResponseParser | None]]
"""Returns the parser of responses for functions with these schemas, or None if it is not needed."""


class Samples(Protocol):
    """Samples one response, whose segments are numbered from `first_segment`."""

    def __call__(
        self, token_ids: Sequence[int], *, max_tokens: int, first_segment: int
    ) -> Awaitable[SampledResponse]: ...


class Dialogue:
    """Runs one conversation between the policy and an environment, from `reset` to the end.

    Raises EnvironmentFault if the environment breaks the protocol, and what `sample` raises.
    """

    def __init__(
        self,
        host: Host,
        tokenizer: PromptTokenizer,
        config: EnvironmentConfig,
        *,
        max_response_tokens: int,
        parser_for: ParserFor | None = None,
    ) -> None:
        """`parser_for` returns the parser of responses; without it, the environment reads calls in JSON."""
        self._host = host
        self._tokenizer = tokenizer
        self._config = config
        self._max_response_tokens = max_response_tokens
        self._parser_for = parser_for

    async def run(
        self,
        uid: str,
        *,
        seed: int,
        columns: Mapping[str, Any],
        sample: Samples,
        begun: PartialResponse | None = None,
        on_progress: Callable[[DialogueState], None] | None = None,
    ) -> Conversation:
        """Run the conversation until the environment ends it, or `max_turns` or `max_tokens` is reached.

        Replays the turns of `begun` to the environment first; raises EnvironmentFault if its answers differ from those
        in `begun`. Calls `on_progress` with the turns so far after each new turn.
        """
        start = await self._host.reset(seed, columns)
        tools = await self._host.tools()
        parser = await self._parser_for(tools) if self._parser_for is not None else None
        is_anew = self._config.history == "as_rendered"
        transcript = Transcript(self._tokenizer, start, tools, parser=parser, renders_anew=is_anew)
        state, replayed = DialogueState(uid, transcript), turns_of(begun)
        while True:
            if replayed:
                prefix, response = replayed.pop(0)
                own = state.unanswered()
                if prefix != own and not transcript.take_kept(prefix, instead_of=own):
                    raise EnvironmentFault(self._config.path or "environment", CHANGED_ANSWER)
            else:
                response = await sample(
                    list(transcript.sequence), max_tokens=self._room(transcript), first_segment=len(state.segments)
                )
            text = state.respond(response)
            step = await self._host.step(text, transcript.calls if tools else None)
            state.add_step(step)
            if on_progress is not None and not replayed:
                on_progress(state)
            if step.terminated or step.truncated:
                return state.finished("stop" if step.terminated else "length")
            if len(state.turns) == self._config.max_turns:
                return state.finished("length")
            replaced_end = transcript.observe(step.observation)
            if self._room(transcript) < 1:
                return state.finished("length", last_token=replaced_end)
            if replaced_end is not None:
                state.drop_end()

    def _room(self, transcript: Transcript) -> int:
        """Return how many tokens the next response may have."""
        return min(self._max_response_tokens, self._config.max_tokens - len(transcript.sequence))


class ProgressSaver:
    """Saves a conversation's turns every `every_tokens` sampled tokens, by calling `on_closed` with them.

    Conversations in which the environment added no token between two turns are not saved: the end of a turn could not
    be recovered.
    """

    def __init__(self, on_closed: Callable[[PartialResponse], None], *, every_tokens: int) -> None:
        self._on_closed = on_closed
        self._every_tokens = every_tokens
        self._num_saved = 0

    def update(self, state: DialogueState) -> None:
        """Save the turns if enough tokens have been sampled since the last time. Call it after each turn."""
        num_sampled = sum(turn.length for turn in state.turns)
        if num_sampled - self._num_saved >= self._every_tokens and state.has_recoverable_turns():
            self._num_saved = num_sampled
            self._on_closed(state.partial())


class DialogueState:
    """The turns of a running conversation, with their segments, log-probabilities and rewards."""

    def __init__(self, uid: str, transcript: Transcript) -> None:
        self._uid = uid
        self._transcript = transcript
        self._given: list[list[int]] = []
        self._sampled: list[tuple[int, list[float]]] = []
        self._parts: dict[str, float] = {}
        self.segments: list[Segment] = []
        self.turns: list[Turn] = []

    def respond(self, response: SampledResponse) -> str:
        """Append a response and return its text."""
        start = len(self._transcript.token_ids)
        self._given += [self.unanswered(), *([] for _ in response.segments[1:])]
        self.segments += shifted(response.segments, start)
        self.turns.append(Turn(start, len(response.token_ids)))
        self._sampled.append((start, response.logprobs))
        return self._transcript.respond(response.token_ids)

    def unanswered(self) -> list[int]:
        """Return the tokens after the policy's last turn: the prompt if there is no turn yet."""
        last = self.turns[-1] if self.turns else Turn(0, 0)
        return self._transcript.token_ids[last.start + last.length :]

    def has_recoverable_turns(self) -> bool:
        """Return whether the environment added a token before every turn, which marks where the turn begins."""
        ends = [turn.start + turn.length for turn in self.turns]
        return all(end < turn.start for end, turn in zip([-1, *ends], self.turns, strict=False))

    def partial(self) -> PartialResponse:
        """Return the turns so far in the form in which they are saved."""
        token_ids, logprobs, segments = list[int](), list[float](), list[Segment]()
        for segment in self.segments:
            segments.append(replace(segment, start=len(token_ids)))
            token_ids += self._transcript.token_ids[segment.start : segment.start + segment.length]
        for _, values in self._sampled:
            logprobs += values
        return PartialResponse(self._uid, token_ids, logprobs, segments, None, list(self._given))

    def add_step(self, step: Step) -> None:
        """Record the reward and the info of the last turn."""
        self.turns[-1] = replace(self.turns[-1], reward=step.reward)
        self._parts |= step.info

    def drop_end(self) -> None:
        """Take the end token off the last turn: the chat template's end token stands in its place."""
        self.turns[-1] = replace(self.turns[-1], length=self.turns[-1].length - 1)
        start, logprobs = self._sampled[-1]
        self._sampled[-1] = (start, logprobs[:-1])
        last = self.segments.pop()
        if last.length > 1:
            self.segments.append(replace(last, length=last.length - 1))
        else:
            self._given.pop()

    def finished(self, finish_reason: str, *, last_token: int | None = None) -> Conversation:
        """Return the conversation up to the policy's last token, without the environment's answer to it.

        `last_token` is the policy's last token if the environment's answer replaced it.
        """
        transcript, last = self._transcript, self.turns[-1]
        token_ids = transcript.token_ids[: last.start + last.length]
        if last_token is not None:
            token_ids[-1] = last_token
        logprobs = [0.0] * len(token_ids)
        for start, values in self._sampled:
            logprobs[start : start + len(values)] = values
        return Conversation(
            self._uid,
            transcript.prompt,
            token_ids,
            logprobs,
            self.segments,
            self.turns,
            finish_reason,
            next(m["content"] for m in reversed(transcript.messages) if m["role"] == "assistant"),
            transcript.messages,
            self._parts,
            [start for start in transcript.sequence_starts if start < len(token_ids)],
        )


def turns_of(begun: PartialResponse | None) -> list[tuple[list[int], SampledResponse]]:
    """Return the turns of a saved conversation: the tokens before each turn, and the sampled response.

    Only the first segment of a turn has tokens before it that the policy did not sample.
    """
    if begun is None:
        return []
    starts = [number for number, prefix in enumerate(begun.given) if prefix]
    return [
        (begun.given[first], _response(begun, begun.segments[first:end]))
        for first, end in zip(starts, [*starts[1:], len(begun.segments)], strict=True)
    ]


def _response(begun: PartialResponse, segments: Sequence[Segment]) -> SampledResponse:
    start, end = segments[0].start, segments[-1].start + segments[-1].length
    from_zero = shifted(segments, -start)
    return SampledResponse(begun.uid, begun.token_ids[start:end], begun.logprobs[start:end], from_zero, "stop")
