"""Fakes of the engine and of the reward client."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import InputError, RewardError
from cluster.scoring import Score, ScoreRequest
from cluster.weights.manifest import Manifest
from rollout_actors.engine.protocol import Sampled, SamplingRequest

EOS = 1
FIRST_TOKEN = 4


def fake_probe(version: int, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Return what a FakeEngine with the weights of `version` computes on probe prompts."""
    return [[-1.0 - 0.1 * version - 0.001 * token for token in sequence[1:]] for sequence in sequences]


def fake_manifest(version: int, incarnation: str = "first") -> Manifest:
    """Return the manifest of a version without tensors, with the probe of a FakeEngine."""
    prompts = ((4, 5, 6), (7, 8))
    previous = fake_probe(version - 1, prompts) if version else None
    return Manifest(version, incarnation, (), prompts, fake_probe(version, prompts), previous)


@dataclass
class FakeEngine:
    """Samples one token per step for every request, from its seed and position.

    `events` records the calls. If `stop_after` is set, a response ends after so many tokens with the end-of-sequence
    token. If `skip_loads` is set, `load` keeps the old weights. The next step raises `fail`, if it is set; every new
    request raises `refuse`, if it is set.
    """

    stop_after: int | None = None
    skip_loads: bool = False
    vocab_size: int = 48
    version: int = -1
    fail: Exception | None = None
    refuse: InputError | None = None
    events: list[tuple[Any, ...]] = field(default_factory=list)
    requests: dict[str, SamplingRequest] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)
    threads: set[str] = field(default_factory=set)

    def add(self, request: SamplingRequest) -> None:
        self._check_refused()
        self.events.append(("add", list(request.token_ids), request.seed))
        self.requests[request.id] = request
        self.done[request.id] = 0

    def step(self) -> list[Sampled]:
        self.threads.add(threading.current_thread().name)
        if self.fail is not None:
            raise self.fail
        self.events.append(("step", self.version, len(self.requests)))
        return [self._advance(request) for request in list(self.requests.values())]

    def _advance(self, request: SamplingRequest) -> Sampled:
        position = self.done[request.id]
        self.done[request.id] = position + 1
        token = FIRST_TOKEN + (request.seed + position) % (self.vocab_size - FIRST_TOKEN)
        finish_reason = "length" if position + 1 == request.max_tokens else None
        if position + 1 == self.stop_after:
            token, finish_reason = EOS, "stop"
        if finish_reason:
            self.abort([request.id])
        return Sampled(request.id, [token], [-0.5 - 0.1 * self.version], finish_reason)

    def abort(self, ids: Sequence[str]) -> None:
        for id_ in ids:
            del self.requests[id_]

    def has_work(self) -> bool:
        return bool(self.requests)

    def load(self, tensors: Mapping[str, Any], *, version: int) -> None:
        assert not self.requests, "weights were loaded while a request was active"
        self.events.append(("load", version))
        if not self.skip_loads:
            self.version = version

    def _check_refused(self) -> None:
        if self.refuse is not None:
            raise self.refuse

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        self._check_refused()
        return fake_probe(self.version, sequences)

    def close(self) -> None:
        self.events.append(("close",))


@dataclass
class FakeRewardClient:
    """Scores with a Python function.

    Raises `error` if it is set; returns the errors in `refused` for the requests with these ids. Waits for `gate` if it
    is set.
    """

    score_one: Callable[[ScoreRequest], float] = lambda request: float(len(request.response))
    error: RewardError | None = None
    gate: asyncio.Event | None = None
    refused: dict[str, RewardError] = field(default_factory=dict)
    requests: list[ScoreRequest] = field(default_factory=list)

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Score | RewardError]:
        self.requests += requests
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return [self._outcome(request) for request in requests]

    def waiting(self) -> str | None:
        return None

    def _outcome(self, request: ScoreRequest) -> Score | RewardError:
        return self.refused.get(request.id) or Score(request.id, self.score_one(request), {}, "fake")
