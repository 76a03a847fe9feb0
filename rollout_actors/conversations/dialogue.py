"""Conversations of the policy with an environment: many at once over one engine, each turn by turn.

The policy's tokens are masked in, what others say is masked out. A single-turn prompt is the shortest conversation and
needs none of this: `single_turn` writes it down. Knows neither queue, rewards nor weights.
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

OTHERWISE = "answers otherwise than it did before: all that is random must come from the seed"


class Samples(Protocol):
    """Samples one response. Its segments are numbered from `first_segment` on."""

    def __call__(
        self, token_ids: Sequence[int], *, max_tokens: int, first_segment: int
    ) -> Awaitable[SampledResponse]: ...


class Table:
    """Where one policy and one environment meet: holds a conversation from `reset` to its end.

    Raises EnvironmentFault where the environment breaks the protocol, and what `sample` raises.
    """

    def __init__(
        self, host: Host, tokenizer: PromptTokenizer, config: EnvironmentConfig, *, max_response_tokens: int
    ) -> None:
        self._host = host
        self._tokenizer = tokenizer
        self._config = config
        self._max_response_tokens = max_response_tokens

    async def hold(
        self,
        uid: str,
        *,
        seed: int,
        columns: Mapping[str, Any],
        sample: Samples,
        begun: PartialResponse | None = None,
        keep: Keeping | None = None,
    ) -> Conversation:
        """One whole conversation. It ends with the environment, after `max_turns`, or where no token more fits.

        Where it is `begun`, the environment hears those turns again before another is sampled; what has been said is
        told to `keep` now and then. Raises EnvironmentFault where the environment answers otherwise than it did.
        """
        start = await self._host.reset(seed, columns)
        transcript = Transcript(self._tokenizer, start, await self._host.tools())
        record, said = Record(uid, transcript), turns_of(begun)
        while True:
            if said:
                given, response = said.pop(0)
                if given != record.given():
                    raise EnvironmentFault(self._config.path or "environment", OTHERWISE)
            else:
                response = await sample(
                    list(transcript.token_ids), max_tokens=self._room(transcript), first_segment=len(record.segments)
                )
            text = record.respond(response)
            step = await self._host.step(text)
            record.take(step)
            if keep is not None and not said:
                keep.hear(record)
            if step.terminated or step.truncated:
                return record.finished("stop" if step.terminated else "length")
            if len(record.turns) == self._config.max_turns:
                return record.finished("length")
            transcript.observe(step.observation)
            if self._room(transcript) < 1:
                return record.finished("length")

    def _room(self, transcript: Transcript) -> int:
        """How many tokens the next response may have."""
        return min(self._max_response_tokens, self._config.max_tokens - len(transcript.token_ids))


class Keeping:
    """Tells of a conversation's turns whenever so many tokens more of it have been sampled.

    One in which somebody said nothing, not one token, is not kept: where a turn ends could not be told.
    """

    def __init__(self, on_closed: Callable[[PartialResponse], None], *, every_tokens: int) -> None:
        self._on_closed = on_closed
        self._every_tokens = every_tokens
        self._num_kept = 0

    def hear(self, record: Record) -> None:
        """A turn is over."""
        num_sampled = sum(turn.length for turn in record.turns)
        if num_sampled - self._num_kept >= self._every_tokens and record.shows_its_turns():
            self._num_kept = num_sampled
            self._on_closed(record.partial())


class Record:
    """What is written down of a conversation while it goes on."""

    def __init__(self, uid: str, transcript: Transcript) -> None:
        self._uid = uid
        self._transcript = transcript
        self._given: list[list[int]] = []
        self._sampled: list[tuple[int, list[float]]] = []
        self._parts: dict[str, float] = {}
        self.segments: list[Segment] = []
        self.turns: list[Turn] = []

    def respond(self, response: SampledResponse) -> str:
        """Take a response; its text."""
        start = len(self._transcript.token_ids)
        self._given += [self.given(), *([] for _ in response.segments[1:])]
        self.segments += shifted(response.segments, start)
        self.turns.append(Turn(start, len(response.token_ids)))
        self._sampled.append((start, response.logprobs))
        return self._transcript.respond(response.token_ids)

    def given(self) -> list[int]:
        """The tokens that others have put behind the last turn, or before the first one."""
        last = self.turns[-1] if self.turns else Turn(0, 0)
        return self._transcript.token_ids[last.start + last.length :]

    def shows_its_turns(self) -> bool:
        """Whether there is a token before every turn, by which it is told from the one before."""
        ends = [turn.start + turn.length for turn in self.turns]
        return all(end < turn.start for end, turn in zip([-1, *ends], self.turns, strict=False))

    def partial(self) -> PartialResponse:
        """The turns so far, as they are kept."""
        token_ids, logprobs, segments = list[int](), list[float](), list[Segment]()
        for segment in self.segments:
            segments.append(replace(segment, start=len(token_ids)))
            token_ids += self._transcript.token_ids[segment.start : segment.start + segment.length]
        for _, values in self._sampled:
            logprobs += values
        return PartialResponse(self._uid, token_ids, logprobs, segments, None, list(self._given))

    def take(self, step: Step) -> None:
        """Take what a response was worth."""
        self.turns[-1] = replace(self.turns[-1], reward=step.reward)
        self._parts |= step.info

    def finished(self, finish_reason: str) -> Conversation:
        """The conversation up to the policy's last token: what was said behind it, nobody answers."""
        transcript, last = self._transcript, self.turns[-1]
        token_ids = transcript.token_ids[: last.start + last.length]
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
        )


def turns_of(begun: PartialResponse | None) -> list[tuple[list[int], SampledResponse]]:
    """The turns that are kept of a conversation: what stood before each, and what was sampled.

    Before the first segment of a turn somebody else has put a token, before its others nobody has.
    """
    if begun is None:
        return []
    starts = [number for number, given in enumerate(begun.given) if given]
    return [
        (begun.given[first], _response(begun, begun.segments[first:end]))
        for first, end in zip(starts, [*starts[1:], len(begun.segments)], strict=True)
    ]


def _response(begun: PartialResponse, segments: Sequence[Segment]) -> SampledResponse:
    start, end = segments[0].start, segments[-1].start + segments[-1].length
    own = shifted(segments, -start)
    return SampledResponse(begun.uid, begun.token_ids[start:end], begun.logprobs[start:end], own, "stop")
