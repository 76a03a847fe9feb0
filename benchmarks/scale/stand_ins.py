"""Stand-ins for the slow parts of a ring: an engine and a learner that only wait, and rewards of 1.

The rollout actor, the queue, the recorder and the weight store around them are real. Nothing here needs a model, a
tokenizer's files or torch, so an actor starts in a second.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from statistics import NormalDist
from typing import Any

from cluster.errors import RewardError
from cluster.journal.events import Record
from cluster.scoring import Score, ScoreRequest
from cluster.weights.manifest import Manifest
from learner.training_loop import Groups, StepResult
from rollout_actors.actor import RolloutActor
from rollout_actors.config import RolloutActorsConfig
from rollout_actors.engine.protocol import Sampled, SamplingRequest

NUM_TOKENS = 64
PROBE_TOKEN_IDS = ((4, 5, 6), (7, 8))


@dataclass(frozen=True, slots=True)
class LogNormalLengths:
    """Response lengths whose logarithm is normal; a spread of 1 has its 99th percentile at ten times the median."""

    median_tokens: float
    spread: float = 1.0

    def left(self, num_done: int, seed: int) -> int:
        """Return the number of further tokens, at least 1, of a response that has `num_done` tokens.

        Drawn from the distribution of lengths above `num_done`, so a swap in the middle of a response changes its
        length but not the distribution of lengths.
        """
        logarithm = NormalDist(math.log(self.median_tokens), self.spread)
        shorter = logarithm.cdf(math.log(num_done)) if num_done else 0.0
        place = shorter + random.Random(seed).random() * (1 - shorter)
        length = math.ceil(math.exp(logarithm.inv_cdf(min(max(place, 1e-12), 1 - 1e-12))))
        return max(1, length - num_done)


@dataclass(frozen=True, slots=True)
class Pace:
    """Speed of a stand-in engine: seconds and tokens of a step, and lengths of responses."""

    step_s: float = 0.0
    tokens_a_step: int = 1
    lengths: LogNormalLengths | None = None
    """If None, every response has the maximum length."""
    deadly_prompt: str | None = None
    """Kills the process of the actor that gets this prompt."""


@dataclass(slots=True)
class _UnderWay:
    """A request, the index of its next token in the response, the end index and the finish reason."""

    request: SamplingRequest
    place: int
    end: int
    finish_reason: str


class StandInEngine:
    """Implements `GenerationEngine`: each token is a function of its segment's seed and its index in the response.

    Its probe log-probabilities are those of `manifest` for the loaded version.
    """

    def __init__(self, pace: Pace, max_response_tokens: int, max_num_seqs: int) -> None:
        self._pace = pace
        self._max_response_tokens = max_response_tokens
        self._max_num_seqs = max_num_seqs
        self._under_way: dict[str, _UnderWay] = {}
        self._version = -1

    def add(self, request: SamplingRequest) -> None:
        """Add a request. The number of tokens that its response already has follows from its `max_tokens`."""
        self._require_harmless(request)
        num_done = self._max_response_tokens - request.max_tokens
        lengths = self._pace.lengths
        left = request.max_tokens if lengths is None else lengths.left(num_done, request.seed)
        reason = "stop" if left < request.max_tokens else "length"
        end = num_done + min(left, request.max_tokens)
        self._under_way[request.id] = _UnderWay(request, num_done, end, reason)

    def _require_harmless(self, request: SamplingRequest) -> None:
        deadly = self._pace.deadly_prompt
        if deadly is not None and [request.token_ids[: len(deadly)]] == Characters().encode([deadly]):
            os.kill(os.getpid(), signal.SIGKILL)

    def step(self) -> list[Sampled]:
        """Wait for the time of a step, and advance the first `max_num_seqs` requests."""
        time.sleep(self._pace.step_s)
        return [self._advance(under_way) for under_way in list(islice(self._under_way.values(), self._max_num_seqs))]

    def _advance(self, under_way: _UnderWay) -> Sampled:
        first, request = under_way.place, under_way.request
        under_way.place = min(first + self._pace.tokens_a_step, under_way.end)
        token_ids = [(request.seed + place) % NUM_TOKENS for place in range(first, under_way.place)]
        has_ended = under_way.place == under_way.end
        if has_ended:
            self.abort([request.id])
        return Sampled(request.id, token_ids, [-1.0] * len(token_ids), under_way.finish_reason if has_ended else None)

    def abort(self, ids: Sequence[str]) -> None:
        """Remove these requests."""
        for id_ in ids:
            del self._under_way[id_]

    def has_work(self) -> bool:
        """Return whether there are unfinished requests."""
        return bool(self._under_way)

    def load(self, tensors: Mapping[str, Any], *, version: int) -> None:
        """Switch to the version."""
        assert not self._under_way
        self._version = version

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the log-probabilities of the loaded version."""
        return _probe(self._version, sequences)

    def close(self) -> None:
        """Do nothing."""


def _probe(version: int, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    return [[-1.0 - 0.1 * version - 0.001 * token for token in sequence[1:]] for sequence in sequences]


def manifest(version: int) -> Manifest:
    """Return a manifest without tensors whose probe matches a `StandInEngine`."""
    previous = _probe(version - 1, PROBE_TOKEN_IDS) if version else None
    return Manifest(version, "stand-in", (), PROBE_TOKEN_IDS, _probe(version, PROBE_TOKEN_IDS), previous)


class Characters:
    """Replaces a tokenizer, whose import takes seconds: a character is a token."""

    def ready(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the row: its prompt is a text."""
        return row

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return each prompt's token ids [P]."""
        return [[ord(character) % NUM_TOKENS for character in prompt] for prompt in prompts]

    def decode(self, responses: Sequence[Sequence[int]], contexts: Sequence[Sequence[int]] | None = None) -> list[str]:
        """Return the text of each response."""
        return ["".join(chr(ord("A") + token) for token in token_ids) for token_ids in responses]


class StandInActor(RolloutActor):
    """Rollout actor with stand-ins for engine and tokenizer, and weights without tensors."""

    def __init__(self, name: str, config: RolloutActorsConfig, pace: Pace) -> None:
        places = config.num_concurrent_groups * config.responses_per_prompt
        super().__init__(
            name,
            config,
            model_path="",
            dtype="float32",
            seed=0,
            build_engine=partial(StandInEngine, pace, config.max_response_tokens, places),
            fetch_tensors=_no_tensors,
        )

    async def start(self) -> None:
        """Start the engine's thread."""
        self._tokenizer: Any = Characters()
        await self._engine.start()

    async def pid(self) -> int:
        """Return the id of the actor's process."""
        return os.getpid()


def _no_tensors(manifest: Manifest) -> dict[str, Any]:
    return {}


class OneToAll:
    """Reward client that gives every response 1."""

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Score | RewardError]:
        """Return one score per request."""
        return [Score(request.id, 1.0, {}, "one") for request in requests]

    def waiting(self) -> str | None:
        """Return None: no reward is ever overdue."""
        return None


class DropsRecords:
    """Journal that keeps nothing."""

    async def record(self, records: Sequence[Record]) -> None:
        """Drop the records."""


class StandInLearners:
    """Learners whose step only waits `step_s` seconds."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s

    async def step(self, step: int, groups: Groups) -> StepResult:
        """Return the manifest of the next version."""
        await asyncio.sleep(self._step_s)
        return StepResult(manifest(step), {}, 1)
