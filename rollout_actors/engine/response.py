"""A response from its first token to its last: what cuts it into segments, and what it is when it is done.

Pure bookkeeping of the engine thread: knows neither engines, threads nor weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from cluster.trajectory import PartialResponse, Segment, segment_seed
from rollout_actors.engine.protocol import SamplingRequest


@dataclass(frozen=True, slots=True)
class SampledResponse:
    """A finished response: N tokens, their log-probabilities, and segments whose `start` counts from its first token.

    `finish_reason` is `stop` (the last token ends the sequence) or `length`.
    """

    uid: str
    token_ids: list[int]
    logprobs: list[float]
    segments: list[Segment]
    finish_reason: str


@dataclass(slots=True, eq=False)
class ActiveRequest:
    """One response being sampled or waiting for weights; once handed over, the engine thread alone touches it.

    `on_closed` is to hear of what there is whenever a segment is closed. A later turn of a conversation counts its
    segments from `first_segment`.
    """

    uid: str
    prompt_token_ids: list[int]
    max_tokens: int
    temperature: float
    min_policy_version: int
    future: asyncio.Future[SampledResponse]
    first_seed: int | None = None
    first_segment: int = 0
    max_segment_tokens: int | None = None
    on_closed: Callable[[PartialResponse], None] | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    seed: int = 0
    segment_start: int = 0

    def go_on_from(self, begun: PartialResponse) -> None:
        """Take what others have sampled of it for its beginning."""
        self.token_ids, self.logprobs = list(begun.token_ids), list(begun.logprobs)
        self.segments = list(begun.segments)

    def end_segment(self, version: int, actor: str) -> bool:
        """Record what was sampled since the segment began; False where nothing was: that is no segment."""
        length = len(self.token_ids) - self.segment_start
        if length:
            self.segments.append(Segment(version, self.segment_start, length, self.seed, actor))
        return length > 0

    def request(self, id_: str) -> SamplingRequest:
        """Begin the next segment: go on from prompt + partial response with a seed of the segment's own."""
        given = None if self.segments else self.first_seed
        self.seed = segment_seed(self.uid, self.first_segment + len(self.segments)) if given is None else given
        self.segment_start = len(self.token_ids)
        return SamplingRequest(
            id=id_,
            token_ids=self.prompt_token_ids + self.token_ids,
            max_tokens=min(self._num_left(), self.max_segment_tokens or self._num_left()),
            seed=self.seed,
            temperature=self.temperature,
        )

    def _num_left(self) -> int:
        return self.max_tokens - len(self.token_ids)

    def ends(self, finish_reason: str) -> bool:
        """Whether the response ends where its segment does."""
        return finish_reason != "length" or not self._num_left()

    def partial(self, finish_reason: str | None = None) -> PartialResponse:
        """What there is when a segment has been closed."""
        return PartialResponse(self.uid, list(self.token_ids), list(self.logprobs), list(self.segments), finish_reason)

    def finished(self, finish_reason: str) -> SampledResponse:
        return SampledResponse(self.uid, self.token_ids, self.logprobs, self.segments, finish_reason)


def shifted(segments: Sequence[Segment], offset: int) -> list[Segment]:
    """The same segments with starts that count from `offset` tokens earlier: from the conversation's first token."""
    return [replace(segment, start=segment.start + offset) for segment in segments]
