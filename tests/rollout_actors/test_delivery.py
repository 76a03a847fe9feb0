"""Tests of deliveries: groups in a wave, slow scorers, failing scorers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from cluster.errors import BatchFailed, RewardError, RewardUnavailable
from cluster.queue.protocol import ProducerQueue
from cluster.scoring import Score, ScoreRequest
from cluster.trajectory import FinishedGroup, Segment, Ticket
from rollout_actors import delivery
from rollout_actors.conversations.conversation import single_turn
from rollout_actors.delivery import Deliveries
from rollout_actors.engine.response import SampledResponse
from rollout_actors.prompts import PromptTokenizer
from tests.support.fakes import FakeRewardClient

PROMPT = [5, 6]


class Puts:
    """The two methods of a queue that deliveries call; records the calls."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.tasks: dict[int, str] = {}
        self.voided: list[tuple[int, str]] = []
        self.changed = asyncio.Condition()

    async def put(self, groups: Sequence[FinishedGroup]) -> None:
        async with self.changed:
            self.calls.append([ticket.group for ticket, _ in groups])
            self.tasks |= {trajectory.group: trajectory.task for _, group in groups for trajectory in group}
            self.changed.notify_all()

    async def void(self, ticket: Ticket, reason: str) -> None:
        async with self.changed:
            self.voided.append((ticket.group, reason))
            self.changed.notify_all()

    async def wait_num(self, num: int) -> None:
        """Wait until `put` and `void` have been called `num` times in total."""
        async with self.changed:
            await asyncio.wait_for(self.changed.wait_for(lambda: len(self.calls) + len(self.voided) >= num), 10)


class Rig:
    def __init__(self, folder: Path) -> None:
        self.puts, self.rewards = Puts(), FakeRewardClient()
        tokenizer = PromptTokenizer(str(folder), max_prompt_tokens=4)
        self.deliveries = Deliveries(tokenizer, cast(ProducerQueue, self.puts), self.rewards)

    def add(self, *groups: int, task: str = "test") -> None:
        for group in groups:
            ticket = Ticket(
                group,
                group,
                0,
                3,
                {"prompt": "t5 t6"},
                "rollout-0",
                task=task,
                num_steps_before=group // 2,
                num_steps=9,
            )
            response = SampledResponse(ticket.uid(0), [7], [-1.0], [Segment(0, 0, 1, 0, "rollout-0")], "length")
            self.deliveries.add(ticket, [single_turn(ticket.row["prompt"], PROMPT, response)])

    async def rewards_requested(self) -> None:
        while not self.rewards.requests:
            await asyncio.sleep(0)


@pytest.fixture
async def rig(tied_folder: Path) -> Rig:
    return Rig(tied_folder)


async def test_groups_that_finish_together_are_put_with_one_call(rig: Rig) -> None:
    rig.add(0, 1, 2)
    await rig.puts.wait_num(1)
    rig.add(3)
    await rig.puts.wait_num(2)
    assert rig.puts.calls == [[0, 1, 2], [3]]


async def test_flush_delivers_the_gathered_groups_at_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "GATHER_S", 1000)
    rig.add(0, 1)
    rig.deliveries.flush()
    await rig.puts.wait_num(1)
    assert rig.puts.calls == [[0, 1]]


async def test_a_wave_does_not_wait_for_the_previous_one(rig: Rig) -> None:
    rig.rewards.gate = asyncio.Event()
    rig.add(0)
    await rig.rewards_requested()
    gate, rig.rewards.gate = rig.rewards.gate, None
    rig.add(1)
    await rig.puts.wait_num(1)
    gate.set()
    await rig.puts.wait_num(2)
    assert rig.puts.calls == [[1], [0]]


async def test_failed_raises_and_nothing_is_put_if_the_service_is_unavailable(rig: Rig) -> None:
    rig.rewards.error = RewardUnavailable("reward_service", "no rewards in 300 s")
    rig.add(0, 1)
    with pytest.raises(RewardUnavailable, match="no rewards in 300 s"):
        await rig.deliveries.failed()
    assert (rig.puts.calls, rig.puts.voided) == ([], [])


async def test_only_the_groups_of_a_wave_that_cannot_be_scored_are_voided(rig: Rig) -> None:
    rig.rewards.refused["3-1-0"] = RewardError("scorer", "returned nothing for 3-1-0")
    rig.add(0, 1, 2)
    await rig.puts.wait_num(2)
    assert rig.puts.calls == [[0, 2]]
    assert rig.puts.voided == [(1, "scorer: returned nothing for 3-1-0")]


async def test_groups_are_scored_one_by_one_if_a_whole_wave_fails(rig: Rig) -> None:
    async def failing(requests: Sequence[ScoreRequest]) -> list[Score | RewardError]:
        if any(request.id == "3-1-0" for request in requests):
            raise RewardError("reward_service", "4 replicas died one after the other with this call")
        return [Score(request.id, 1.0, {}, "v") for request in requests]

    rig.rewards.outcomes = failing  # type: ignore[method-assign]
    rig.add(0, 1, 2)
    await rig.puts.wait_num(3)
    assert sorted(rig.puts.calls) == [[0], [2]]
    assert [group for group, _ in rig.puts.voided] == [1]


async def test_groups_are_scored_one_by_one_if_a_scorer_fails_on_their_batch(rig: Rig) -> None:
    async def failing(requests: Sequence[ScoreRequest]) -> list[Score | RewardError]:
        if any(request.id == "3-1-0" for request in requests):
            return [BatchFailed("f", f"raised ValueError (scoring {request.id})") for request in requests]
        return [Score(request.id, 1.0, {}, "v") for request in requests]

    rig.rewards.outcomes = failing  # type: ignore[method-assign]
    rig.add(0, 1, 2)
    await rig.puts.wait_num(3)
    assert sorted(rig.puts.calls) == [[0], [2]]
    assert rig.puts.voided == [(1, "f: raised ValueError (scoring 3-1-0)")]


async def test_requests_say_the_step_that_trains_the_response(rig: Rig) -> None:
    rig.add(4)
    await rig.puts.wait_num(1)
    (request,) = rig.rewards.requests
    assert request.columns["trainer_state"] == {"global_step": 2, "max_steps": 9}


async def test_nothing_is_put_after_cancel(rig: Rig) -> None:
    rig.rewards.gate = asyncio.Event()
    rig.add(0)
    await rig.rewards_requested()
    await rig.deliveries.cancel()
    rig.rewards.gate.set()
    await asyncio.sleep(0)
    assert rig.puts.calls == []


async def test_a_wave_of_several_tasks_is_scored_with_one_call(rig: Rig) -> None:
    rig.add(0, task="sums")
    rig.add(1, task="games")
    await rig.puts.wait_num(1)
    assert rig.puts.calls == [[0, 1]]
    assert [request.task for request in rig.rewards.requests] == ["sums", "games"]
    assert rig.puts.tasks == {0: "sums", 1: "games"}
