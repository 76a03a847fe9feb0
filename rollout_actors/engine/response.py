"""One response from its first token to its last: its request, its segments and its result.

Bookkeeping of the engine thread. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from cluster.trajectory import PartialResponse, Segment, segment_seed
from rollout_actors.engine.protocol import UNLOADED_VERSION, SamplingRequest, Truncation
from rollout_actors.engine.stop_texts import StopTexts


class SamplingOptions(NamedTuple):
    """What all responses of an actor have in common beside the temperature."""

    truncation: Truncation = Truncation()
    stop: StopTexts | None = None


@dataclass(frozen=True, slots=True)
class ResponseRequest:
    """A response to sample. Its tokens depend only on prompt, weights and seeds, and the seeds on `uid`."""

    uid: str
    prompt_token_ids: Sequence[int]
    max_tokens: int
    temperature: float
    min_policy_version: int = UNLOADED_VERSION
    """Sampling waits until weights of at least this version are loaded."""
    seed: int | None = None
    """Seed of the first segment, if it is not to be derived from `uid`."""
    first_segment: int = 0
    """Number of the first segment. The later turns of a conversation continue the count."""
    max_segment_tokens: int | None = None
    """Length at which a segment ends and the next one starts; None for no limit."""
    begun: PartialResponse | None = None
    """Tokens that were sampled before, perhaps by another actor: sampling continues from them."""
    options: SamplingOptions = SamplingOptions()
    on_closed: Callable[[PartialResponse], None] | None = None
    """Called in the event loop with the response so far, whenever a segment is finished."""


@dataclass(frozen=True, slots=True)
class SampledResponse:
    """A finished response: N tokens with log-probabilities, and segments.

    The `start` of a segment counts from the first token of the response.
    `finish_reason` is `stop` (the last token ends the sequence or a stop text) or `length`.
    """

    uid: str
    token_ids: list[int]
    logprobs: list[float]
    segments: list[Segment]
    finish_reason: str


@dataclass(slots=True, eq=False)
class ActiveRequest:
    """A request that is being sampled or waits for weights.

    Only the engine thread may use it once it has it.
    """

    request: ResponseRequest
    future: asyncio.Future[SampledResponse]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    seed: int = 0
    segment_start: int = 0

    def __post_init__(self) -> None:
        """Continue from copies of what was sampled before."""
        begun = self.request.begun
        if begun is not None:
            self.token_ids, self.logprobs = list(begun.token_ids), list(begun.logprobs)
            self.segments = list(begun.segments)

    def end_segment(self, version: int, actor: str) -> bool:
        """Record the segment that ends here. Returns False, and records nothing, if it has no token."""
        length = len(self.token_ids) - self.segment_start
        if length:
            self.segments.append(Segment(version, self.segment_start, length, self.seed, actor))
        return length > 0

    def next_segment(self, id_: str) -> SamplingRequest:
        """Start the next segment: return the engine's request that continues prompt + partial response."""
        request = self.request
        if request.seed is not None and not self.segments:
            self.seed = request.seed
        else:
            self.seed = segment_seed(request.uid, request.first_segment + len(self.segments))
        self.segment_start = len(self.token_ids)
        return SamplingRequest(
            id=id_,
            token_ids=[*request.prompt_token_ids, *self.token_ids],
            max_tokens=min(self._num_left(), request.max_segment_tokens or self._num_left()),
            seed=self.seed,
            temperature=request.temperature,
            truncation=request.options.truncation,
        )

    def add(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> bool:
        """Append sampled tokens; returns whether a stop text ends the response, and drops the tokens behind it."""
        self.token_ids += token_ids
        self.logprobs += logprobs
        stop = self.request.options.stop
        end = stop.end(self.token_ids, len(token_ids)) if stop is not None else None
        if end is None:
            return False
        del self.token_ids[end:], self.logprobs[end:]
        return True

    def _num_left(self) -> int:
        return self.request.max_tokens - len(self.token_ids)

    def is_finished(self, finish_reason: str) -> bool:
        """Return whether the response ends with the segment that ended for this reason."""
        return finish_reason != "length" or not self._num_left()

    def partial(self, finish_reason: str | None = None) -> PartialResponse:
        """Return a copy of the response so far. `finish_reason` is None if it is unfinished."""
        uid = self.request.uid
        return PartialResponse(uid, list(self.token_ids), list(self.logprobs), list(self.segments), finish_reason)

    def finished(self, finish_reason: str) -> SampledResponse:
        """Return the finished response."""
        return SampledResponse(self.request.uid, self.token_ids, self.logprobs, self.segments, finish_reason)


def shifted(segments: Sequence[Segment], offset: int) -> list[Segment]:
    """Return the segments with `offset` added to every start."""
    return [replace(segment, start=segment.start + offset) for segment in segments]
