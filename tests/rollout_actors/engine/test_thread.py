"""Tests of the engine thread with a fake engine: versions, segments, order, errors, end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from cluster.errors import EngineError, InputError
from cluster.trajectory import PartialResponse, segment_seed
from rollout_actors.engine.response import ResponseRequest, SampledResponse, SamplingOptions
from rollout_actors.engine.stop_texts import StopTexts
from rollout_actors.engine.thread import EngineThread
from tests.support.fakes import EOS, FakeEngine, fake_manifest, fake_probe


class Gate:
    """Calls the function in `at` with the number of the next step, in the engine thread."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.at: dict[int, Callable[[], object]] = {}

    def __call__(self) -> None:
        self.num_steps += 1
        self.at.get(self.num_steps, lambda: None)()


class Rig:
    """An engine thread with a fake engine and a gate before its steps."""

    def __init__(self) -> None:
        self.fake = FakeEngine()
        self.gate = Gate()
        self.engine = EngineThread(lambda: self.fake, name="rollout-0", dtype="float32", before_step=self.gate)

    def offer(self, version: int) -> None:
        self.engine.offer_weights(fake_manifest(version), {})

    def sample(self, uid: str, floor: int = 0, max_tokens: int = 4) -> asyncio.Task[SampledResponse]:
        request = ResponseRequest(uid, [4, 5], max_tokens, 1.0, floor)
        return asyncio.ensure_future(self.engine.sample(request))

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [event for event in self.fake.events if event[0] == name]


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    await rig.engine.start()
    yield rig
    await rig.engine.close()


async def test_a_response_has_its_segment_and_version(rig: Rig) -> None:
    rig.offer(0)
    response = await rig.sample("0-0-0")
    seed = segment_seed("0-0-0", 0)
    assert len(response.token_ids) == len(response.logprobs) == 4
    assert [(s.policy_version, s.start, s.length, s.seed, s.actor) for s in response.segments] == [
        (0, 0, 4, seed, "rollout-0")
    ]
    assert response.finish_reason == "length"


async def test_a_response_that_stops_keeps_its_end_of_sequence_token(rig: Rig) -> None:
    rig.fake.stop_after = 2
    rig.offer(0)
    response = await rig.sample("0-0-0")
    assert (response.finish_reason, len(response.token_ids), response.token_ids[-1]) == ("stop", 2, EOS)


async def test_only_the_thread_uses_the_engine(rig: Rig) -> None:
    rig.offer(0)
    await asyncio.gather(*(rig.sample(f"0-{i}-0") for i in range(5)))
    assert rig.fake.threads == {"engine of rollout-0"}


async def test_no_token_is_sampled_with_weights_older_than_the_floor(rig: Rig) -> None:
    rig.offer(0)
    early, late = rig.sample("0-0-0", floor=0), rig.sample("0-1-0", floor=2)
    await early
    assert not late.done()
    rig.offer(2)
    assert [s.policy_version for s in (await late).segments] == [2]


async def test_a_swap_ends_segments_and_continues_the_partial_response(rig: Rig) -> None:
    rig.gate.at[3] = lambda: rig.offer(1)
    rig.offer(0)
    response = await rig.sample("0-0-0", max_tokens=8)
    assert [(s.policy_version, s.start, s.length) for s in response.segments] == [(0, 0, 3), (1, 3, 5)]
    seeds = [segment_seed("0-0-0", 0), segment_seed("0-0-0", 1)]
    assert rig.named("add") == [("add", [4, 5], seeds[0]), ("add", [4, 5, *response.token_ids[:3]], seeds[1])]
    assert response.logprobs == [-0.5] * 3 + [-0.6] * 5
    assert rig.engine.metrics()["num_prefilled_again_tokens"] == 5


async def test_on_closed_is_called_for_every_segment_of_max_segment_tokens(rig: Rig) -> None:
    closed: list[PartialResponse] = []
    rig.offer(0)
    response = await rig.engine.sample(
        ResponseRequest("0-0-0", [4, 5], 5, 1.0, max_segment_tokens=2, on_closed=closed.append)
    )
    assert [(s.start, s.length, s.seed) for s in response.segments] == [
        (start, length, segment_seed("0-0-0", number))
        for number, (start, length) in enumerate([(0, 2), (2, 2), (4, 1)])
    ]
    assert (len(response.token_ids), response.finish_reason) == (5, "length")
    assert [len(partial.token_ids) for partial in closed] == [2, 4, 5]
    assert [partial.finish_reason for partial in closed] == [None, None, "length"]
    assert closed[1].segments == response.segments[:2]


async def test_sampling_continues_from_begun(rig: Rig) -> None:
    rig.offer(0)
    request = ResponseRequest("0-0-0", [4, 5], 6, 1.0, max_segment_tokens=3)
    whole = await rig.engine.sample(request)
    begun = PartialResponse("0-0-0", whole.token_ids[:3], whole.logprobs[:3], whole.segments[:1])
    again = await rig.engine.sample(replace(request, begun=begun))
    assert again == whole
    assert len(begun.token_ids) == 3, "begun is not changed"


async def test_a_segment_without_tokens_is_not_recorded(rig: Rig) -> None:
    released = threading.Event()
    rig.offer(0)
    await rig.engine.loaded(0)
    rig.gate.at[1] = released.wait
    holding = rig.sample("0-9-0", max_tokens=1)
    late = rig.sample("0-0-0", floor=0)
    await asyncio.sleep(0)
    rig.offer(1)
    released.set()
    await holding
    response = await late
    assert sum(segment.length for segment in response.segments) == 4
    assert all(segment.length for segment in response.segments)
    assert [s.seed for s in response.segments] == [
        segment_seed("0-0-0", index) for index in range(len(response.segments))
    ]


async def test_only_the_newest_offered_version_is_loaded(rig: Rig) -> None:
    released = threading.Event()
    rig.offer(0)
    await rig.engine.loaded(0)
    rig.gate.at[1] = released.wait
    response = rig.sample("0-0-0")
    await asyncio.sleep(0)
    for version in (1, 2, 3):
        rig.offer(version)
    released.set()
    await response
    await rig.engine.loaded(3)
    assert rig.named("load") == [("load", 0), ("load", 3)]


async def test_a_response_waits_if_a_new_learner_starts_below_its_floor(rig: Rig) -> None:
    rig.offer(5)
    await rig.engine.loaded(5)
    rig.gate.at[2] = lambda: rig.engine.offer_weights(fake_manifest(4, "second"), {})
    waiting = rig.sample("0-0-0", floor=5)
    other = rig.sample("0-1-0", floor=4)
    await other
    assert not waiting.done()
    rig.engine.offer_weights(fake_manifest(5, "second"), {})
    assert all(segment.policy_version == 5 for segment in (await waiting).segments)


async def test_a_cancelled_response_is_removed_from_the_engine(rig: Rig) -> None:
    rig.offer(0)
    await rig.engine.loaded(0)
    reached, released = threading.Event(), threading.Event()

    def hold() -> None:
        reached.set()
        released.wait()

    rig.gate.at[2] = hold
    response = rig.sample("0-0-0", max_tokens=1_000_000)
    await asyncio.to_thread(reached.wait)
    response.cancel()
    with pytest.raises(asyncio.CancelledError):
        await response
    released.set()
    await rig.engine.logprobs([[4, 5]])
    assert not rig.fake.requests


async def test_logprobs_come_from_the_loaded_version(rig: Rig) -> None:
    rig.offer(3)
    await rig.engine.loaded(3)
    assert await rig.engine.logprobs([[4, 5, 6]]) == fake_probe(3, [[4, 5, 6]])


async def test_metrics_count_tokens_and_proved_swaps(rig: Rig) -> None:
    for version in range(3):
        rig.offer(version)
        await rig.engine.loaded(version)
    await rig.sample("0-0-0")
    metrics = rig.engine.metrics()
    assert (metrics["policy_version"], metrics["num_sampled_tokens"], metrics["num_responses"]) == (2, 4, 1)
    assert (metrics["num_swaps_proved"], metrics["num_swaps_checksum_only"]) == (3, 0)
    intervals = rig.engine.take_intervals()
    assert [version for version, _, _ in intervals] == [2]
    assert all(start < end for _, start, end in intervals)
    assert rig.engine.take_intervals() == []


async def test_all_pending_calls_raise_the_error_of_a_failed_engine() -> None:
    rig = Rig()
    rig.fake.fail = ValueError("out of blocks")
    await rig.engine.start()
    below, waiting = rig.sample("0-0-0", floor=-1), rig.sample("0-1-0", floor=9)
    for call in (below, waiting):
        with pytest.raises(EngineError, match=r"rollout-0: the engine failed: ValueError: out of blocks"):
            await call
    with pytest.raises(EngineError, match="out of blocks"):
        await rig.engine.ended()
    with pytest.raises(EngineError, match="out of blocks"):
        await rig.engine.logprobs([[4]])


async def test_ended_raises_if_the_weights_were_not_loaded() -> None:
    rig = Rig()
    await rig.engine.start()
    rig.offer(0)
    await rig.engine.loaded(0)
    rig.fake.skip_loads = True
    rig.offer(1)
    with pytest.raises(EngineError, match="does not hold version 1"):
        await rig.engine.ended()


async def test_start_raises_the_error_of_building_the_engine() -> None:
    def build() -> FakeEngine:
        raise InputError("rollout_actors.engine", "no such setting")

    with pytest.raises(InputError, match="no such setting"):
        await EngineThread(build, name="rollout-0", dtype="float32").start()


async def test_close_closes_the_engine_and_ends_pending_calls() -> None:
    rig = Rig()
    await rig.engine.start()
    waiting = rig.sample("0-0-0", floor=3)
    await asyncio.sleep(0)
    await rig.engine.close()
    await rig.engine.ended()
    assert rig.fake.events[-1] == ("close",)
    with pytest.raises(EngineError, match="the engine was closed"):
        await waiting


async def test_a_stop_text_is_found_across_a_swap_and_ends_the_response(rig: Rig) -> None:
    rig.offer(0)
    whole = await rig.sample("0-0-0", max_tokens=8)
    pieces = {token: chr(97 + token) for token in range(48)}
    seeds = [segment_seed("0-0-0", number) for number in (0, 1)]
    tokens = [4 + (seeds[0] + place) % 44 for place in range(3)] + [4 + (seeds[1] + place) % 44 for place in range(5)]
    assert whole.token_ids[:3] == tokens[:3]
    stop = StopTexts(["".join(pieces[token] for token in tokens[2:5])], lambda ids: "".join(pieces[i] for i in ids))
    options = SamplingOptions(stop=stop)
    rig.gate.at[rig.gate.num_steps + 3] = lambda: rig.offer(1)
    response = await rig.engine.sample(ResponseRequest("0-0-0", [4, 5], 8, 1.0, options=options))
    assert (response.token_ids, response.finish_reason) == (tokens[:5], "stop")
    assert [(s.policy_version, s.length) for s in response.segments] == [(0, 3), (1, 2)]
    assert not rig.fake.has_work(), "the engine samples no more of it"


async def test_a_refused_request_leaves_the_other_requests_running(rig: Rig) -> None:
    rig.offer(0)
    await rig.sample("0-0-1")
    rig.fake.refuse = InputError("rollout_actors.engine", "too long")
    with pytest.raises(InputError, match="too long"):
        await rig.sample("0-0-0")
    with pytest.raises(InputError, match="too long"):
        await rig.engine.logprobs([[4, 5]])
    rig.fake.refuse = None
    assert len((await rig.sample("0-1-0")).token_ids) == 4
