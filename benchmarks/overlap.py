"""Overlap of sampling and learning: the longer of the two over the time of a step.

With latency stand-ins for both (the real queue, rollout actor and training loop around them, in one process) nothing
competes for the processor, so that what is lost is lost by the coordination.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from benchmarks.results import Row
from cluster.config import TrajectoryQueueConfig
from cluster.scoring import Score, ScoreRequest
from cluster.trajectory_queue import TrajectoryQueue
from cluster.weights import Manifest, WeightStore
from learner.training_loop import Groups, StepResult, train
from rollout_actors.config import RolloutActorsConfig
from rollout_actors.engine import Sampled, SamplingRequest
from rollout_actors.rollout_actor import RolloutActor

GROUPS_PER_STEP, RESPONSE_TOKENS, NUM_STEPS = 32, 16, 30
TOKEN_S, LEARN_S = 0.02, 0.32


class SlowEngine:
    """One token for every request each `TOKEN_S` seconds; holds any version it is told."""

    def __init__(self) -> None:
        self._requests: dict[str, SamplingRequest] = {}
        self._done: dict[str, int] = {}

    def add(self, request: SamplingRequest) -> None:
        self._requests[request.id] = request
        self._done[request.id] = 0

    def step(self) -> list[Sampled]:
        time.sleep(TOKEN_S)
        return [self._advance(request) for request in list(self._requests.values())]

    def _advance(self, request: SamplingRequest) -> Sampled:
        self._done[request.id] += 1
        ended = self._done[request.id] == request.max_tokens
        if ended:
            self.abort([request.id])
        return Sampled(request.id, [5], [-1.0], "length" if ended else None)

    def abort(self, ids: Any) -> None:
        for id_ in ids:
            del self._requests[id_]

    def has_work(self) -> bool:
        return bool(self._requests)

    def load(self, tensors: Any, *, version: int) -> None:
        assert not self._requests

    def logprobs(self, sequences: Any) -> list[list[float]]:
        return [[-1.0] * (len(sequence) - 1) for sequence in sequences]

    def close(self) -> None: ...


class SlowLearners:
    """A step is `LEARN_S` seconds of waiting."""

    async def step(self, step: int, groups: Groups) -> StepResult:
        await asyncio.sleep(LEARN_S)
        return StepResult(manifest(step), {}, 1)


class OneToAll:
    """Every reward is 1."""

    async def score(self, requests: Any) -> list[Score]:
        return [Score(request.id, 1.0, {}, "one") for request in requests if isinstance(request, ScoreRequest)]


class Published:
    """Store and queue in this process."""

    def __init__(self, store: WeightStore, queue: TrajectoryQueue) -> None:
        self._store, self._queue = store, queue

    async def publish(self, published: Manifest) -> None:
        await self._store.publish(published)
        await self._queue.published(published.version)


def manifest(version: int) -> Manifest:
    """A version without tensors that `SlowEngine` agrees with."""
    return Manifest(version, "bench", (), ((4, 5, 6),), [[-1.0, -1.0]], [[-1.0, -1.0]] if version else None)


async def measure(model_path: str) -> list[Row]:
    """Longer phase over step time, after the first steps."""
    queue = TrajectoryQueue(
        TrajectoryQueueConfig(groups_per_step=GROUPS_PER_STEP, max_policy_lag=1),
        [{"prompt": "bcd:"}],
        run_seed=0,
        num_steps=NUM_STEPS,
    )
    store, ends = WeightStore(), []
    config = RolloutActorsConfig(
        responses_per_prompt=1,
        max_prompt_tokens=9,
        max_response_tokens=RESPONSE_TOKENS,
        num_concurrent_groups=GROUPS_PER_STEP,
    )
    actor = RolloutActor(
        "rollout-0",
        config,
        model_path=model_path,
        dtype="float32",
        task="bench",
        seed=0,
        build_engine=SlowEngine,
        fetch_tensors=lambda _: {},
    )
    await actor.start()

    async def report(step: int, groups: Groups, result: StepResult) -> None:
        ends.append(time.monotonic())

    published = Published(store, queue)
    await published.publish(manifest(0))
    running = asyncio.ensure_future(actor.run(queue, store, OneToAll()))
    await train(
        first_step=1, num_steps=NUM_STEPS, learners=SlowLearners(), queue=queue, weights=published, report=report
    )
    await actor.close()
    await running
    step_s = (ends[-1] - ends[4]) / (len(ends) - 5)
    longer_s = max(TOKEN_S * RESPONSE_TOKENS, LEARN_S)
    return [Row("overlap with latency stand-ins: longer phase / step time", (longer_s / step_s,), "", ">= 0.9")]
