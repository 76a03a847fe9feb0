"""Test the queue: admission, numbering and steps."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest

from cluster.config import TrajectoryQueueConfig
from cluster.data.prompt_order import PromptOrder, TaskPrompts
from cluster.errors import DeadlineExceeded, GroupsVoided, TrajectoryRefused
from cluster.journal.events import Record
from cluster.ledger import PendingGroup, ResumePoint
from cluster.queue.trajectory_queue import TrajectoryQueue
from cluster.trajectory import PartialGroup, PartialResponse, Segment, Ticket, Trajectory, Turn

ROWS = [{"prompt": f"p{i}"} for i in range(5)]


def make_queue(groups_per_step: int = 2, max_policy_lag: int = 1, num_steps: int = 4, **kwargs: Any) -> TrajectoryQueue:
    settings = {"max_void_share": kwargs.pop("max_void_share")} if "max_void_share" in kwargs else {}
    config = TrajectoryQueueConfig(
        groups_per_step=groups_per_step,
        max_policy_lag=max_policy_lag,
        take_timeout_s=kwargs.pop("take_timeout_s", 5),
        **settings,
    )
    prompts = kwargs.pop("prompts", [TaskPrompts("t", ROWS)])
    return TrajectoryQueue(config, prompts, run_seed=7, num_steps=num_steps, **kwargs)


def finished(ticket: Ticket, version: int | None = None, reward: float | None = 1.0) -> list[Trajectory]:
    version = ticket.min_policy_version if version is None else version
    return [
        Trajectory(
            uid=ticket.uid(0),
            group=ticket.group,
            task="t",
            token_ids=[1, 2],
            mask=[False, True],
            behavior_logprobs=[0.0, -1.0],
            segments=[Segment(version, 1, 1, 0, ticket.owner)],
            turns=[Turn(1, 1)],
            admission_index=ticket.admission_index,
            finish_reason="stop",
            reward=reward,
        )
    ]


async def admit_all(queue: TrajectoryQueue, owner: str = "a") -> list[Ticket]:
    return await queue.admit(owner, max_groups=1000, timeout_s=0.01)


async def test_nothing_is_admitted_before_the_first_publication() -> None:
    assert await admit_all(make_queue()) == []


@pytest.mark.parametrize("lag", [0, 1, 2])
async def test_a_group_is_admitted_once_its_floor_is_published_and_carries_it(lag: int) -> None:
    queue = make_queue(max_policy_lag=lag)
    floors = []
    for version in range(4):
        await queue.published(version)
        floors.append([(t.admission_index, t.min_policy_version) for t in await admit_all(queue)])
    expected: list[list[tuple[int, int]]] = [[], [], [], []]
    for i in range(8):
        floor = max(0, i // 2 - lag)
        expected[floor].append((i, floor))
    assert floors == expected


async def test_a_waiting_actor_is_woken_by_publication() -> None:
    queue = make_queue(max_policy_lag=0, num_steps=2)
    await queue.published(0)
    await admit_all(queue)
    waiting = asyncio.create_task(queue.admit("a", max_groups=1, timeout_s=5))
    await asyncio.sleep(0)
    assert not waiting.done()
    await queue.published(1)
    assert [ticket.min_policy_version for ticket in await waiting] == [1]


async def test_no_more_is_granted_than_asked_for() -> None:
    queue = make_queue(groups_per_step=4)
    await queue.published(0)
    assert [t.admission_index for t in await queue.admit("a", max_groups=3, timeout_s=1)] == [0, 1, 2]


async def test_those_who_wait_together_share_what_a_publication_admits() -> None:
    queue = make_queue(groups_per_step=3, max_policy_lag=0)
    waiting = [asyncio.create_task(queue.admit(owner, max_groups=8, timeout_s=5)) for owner in ("a", "b")]
    await asyncio.sleep(0)
    await queue.published(0)
    assert [[t.admission_index for t in granted] for granted in await asyncio.gather(*waiting)] == [[0, 1], [2]]


async def test_put_takes_no_group_if_one_is_refused() -> None:
    queue = make_queue(max_policy_lag=0)
    await queue.published(0)
    good, bad = await admit_all(queue)
    with pytest.raises(TrajectoryRefused, match="has no reward"):
        await queue.put([(good, finished(good)), (bad, finished(bad, reward=None))])
    await queue.put([(good, finished(good)), (bad, finished(bad))])
    assert len(await queue.take(1)) == 2


async def test_take_gives_the_groups_in_admission_order_however_they_arrive() -> None:
    queue = make_queue(groups_per_step=3)
    await queue.published(0)
    tickets = (await admit_all(queue))[:3]
    for ticket in (tickets[2], tickets[0], tickets[1]):
        await queue.put([(ticket, finished(ticket))])
    groups = await queue.take(1)
    assert [(g[0].admission_index, g[0].step) for g in groups] == [(0, 1), (1, 1), (2, 1)]


async def test_take_names_missing_groups_and_their_holders_at_the_deadline() -> None:
    queue = make_queue(take_timeout_s=0.02)
    await queue.published(0)
    await queue.admit("rollout-3", max_groups=1, timeout_s=1)
    with pytest.raises(DeadlineExceeded, match=r"group 0 \(held by rollout-3\), group 1 \(held by no actor\)"):
        await queue.take(1)


async def test_a_voided_group_is_replaced_under_the_same_number_and_floor() -> None:
    queue = make_queue(max_policy_lag=0, num_steps=1)
    await queue.published(0)
    first, second = await admit_all(queue)
    await queue.void(first, "the prompt is poisoned")
    (replacement,) = await admit_all(queue, "b")
    assert (replacement.admission_index, replacement.min_policy_version) == (0, 0)
    assert replacement.uid(0) not in {first.uid(0), second.uid(0)}
    await queue.put([(second, finished(second))])
    await queue.put([(replacement, finished(replacement))])
    assert [g[0].uid for g in await queue.take(1)] == [replacement.uid(0), second.uid(0)]
    counts = await queue.counts()
    assert (counts.num_admitted, counts.num_trained, counts.num_void, counts.num_open) == (3, 2, 1, 0)
    assert await queue.voided() == [(first.uid(0), "the prompt is poisoned")]


async def test_another_actor_finishes_a_group_under_its_floor() -> None:
    queue = make_queue(max_policy_lag=0)
    await queue.published(0)
    first, _ = await admit_all(queue, "rollout-0")
    assert await queue.hand_over("rollout-0") == [0, 1]
    again = await admit_all(queue, "rollout-1")
    assert [(t.group, t.min_policy_version, t.owner) for t in again] == [(0, 0, "rollout-1"), (1, 0, "rollout-1")]
    with pytest.raises(TrajectoryRefused, match=r"rollout-0 no longer holds this group \(rollout-1 does\)"):
        await queue.put([(first, finished(first))])
    counts = await queue.counts()
    assert counts.num_admitted == counts.num_trained + counts.num_void + counts.num_open == 2


@pytest.mark.parametrize(
    ("version", "reward", "what"),
    [(0, 1.0, "older than its floor 1"), (2, 1.0, "version 2 is not published yet"), (1, None, "has no reward")],
)
async def test_a_trajectory_that_breaks_a_rule_is_refused(version: int, reward: float | None, what: str) -> None:
    queue = make_queue(max_policy_lag=0, standing=ResumePoint.at(2, 0))
    await queue.published(1)
    ticket = (await admit_all(queue))[0]
    with pytest.raises(TrajectoryRefused, match=what):
        await queue.put([(ticket, finished(ticket, version, reward))])


async def test_a_resumed_queue_continues_with_the_next_number_and_prompt() -> None:
    whole, resumed = make_queue(), make_queue(standing=ResumePoint.at(4, 0))
    for queue in (whole, resumed):
        await queue.published(3)
    assert [(t.admission_index, t.row) for t in await admit_all(whole)][4:] == [
        (t.admission_index, t.row) for t in await admit_all(resumed)
    ]


def test_the_prompt_order_is_a_permutation_of_the_rows_every_epoch() -> None:
    order = PromptOrder(ROWS, seed=1)
    epochs = [[order.row(5 * e + i)["prompt"] for i in range(5)] for e in range(3)]
    assert all(sorted(epoch) == [r["prompt"] for r in ROWS] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    again = PromptOrder(ROWS, seed=1)
    assert [again.row(i)["prompt"] for i in range(15)] == [p for epoch in epochs for p in epoch]


async def test_a_call_that_an_actor_left_behind_when_it_died_is_granted_nothing() -> None:
    queue = make_queue()
    left_behind = asyncio.create_task(queue.admit("rollout-0", max_groups=1, timeout_s=5))
    await asyncio.sleep(0)
    await queue.hand_over("rollout-0")
    await queue.published(0)
    assert await left_behind == []
    assert (await queue.counts()).num_open == 0


class FakeRecorder:
    """Keeps the records, and returns once `gate` is open; raises `error` instead if it is set."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: TrajectoryRefused | None = None

    async def record(self, records: Sequence[Record]) -> None:
        if self.error is not None:
            raise self.error
        self.records += records
        await self.gate.wait()

    def kinds(self) -> list[str]:
        return [record["kind"] for record in self.records]


async def recorded_queue(**kwargs: Any) -> tuple[TrajectoryQueue, FakeRecorder, list[Ticket]]:
    """A queue whose first step's groups are held by `a`, and its recorder."""
    recorder = FakeRecorder()
    queue = make_queue(max_policy_lag=0, recorder=recorder, **kwargs)
    await queue.published(0)
    return queue, recorder, await admit_all(queue)


async def test_a_step_takes_no_group_before_it_is_recorded() -> None:
    queue, recorder, tickets = await recorded_queue()
    recorder.gate.clear()
    putting = asyncio.create_task(queue.put([(ticket, finished(ticket)) for ticket in tickets]))
    taking = asyncio.create_task(queue.take(1))
    for _ in range(10):
        await asyncio.sleep(0)
    assert (putting.done(), taking.done(), (await queue.counts()).num_open) == (False, False, 2)
    recorder.gate.set()
    assert len(await taking) == 2
    assert recorder.kinds() == ["ADMIT", "ADMIT", "TOKENS", "SCORE", "TOKENS", "SCORE"]
    assert [r["group"] for r in recorder.records[:2]] == [0, 1]


async def test_what_is_being_recorded_when_its_actor_dies_is_not_sampled_again() -> None:
    queue, recorder, (first, _) = await recorded_queue()
    recorder.gate.clear()
    putting = asyncio.create_task(queue.put([(first, finished(first))]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    dying = asyncio.create_task(queue.declare_dead("a"))
    recorder.gate.set()
    assert await dying == [1]
    await putting
    assert [ticket.group for ticket in await admit_all(queue, "b")] == [1]
    assert recorder.kinds() == ["ADMIT", "ADMIT", "TOKENS", "SCORE", "FENCE"]


async def test_what_the_recorder_refuses_falls_free_for_others() -> None:
    queue, recorder, (first, _) = await recorded_queue()
    recorder.error = TrajectoryRefused(first.uid(0), "a was declared dead before it sent this")
    with pytest.raises(TrajectoryRefused, match="declared dead"):
        await queue.put([(first, finished(first))])
    recorder.error = None
    again = await admit_all(queue, "b")
    assert [(ticket.group, ticket.owner) for ticket in again] == [(0, "b")]
    assert recorder.kinds() == ["ADMIT", "ADMIT"], "it was admitted once"


async def test_a_voided_group_and_its_replacement_are_recorded() -> None:
    queue, recorder, (first, _) = await recorded_queue(num_steps=1)
    await queue.void(first, "the prompt is poisoned")
    await admit_all(queue)
    assert [(r["kind"], r["group"], r.get("reason"), r.get("admission_index")) for r in recorder.records[2:]] == [
        ("VOID", 0, "the prompt is poisoned", None),
        ("ADMIT", 2, None, 0),
    ]


def begun(ticket: Ticket, num_tokens: int) -> PartialGroup:
    """A response of which so many tokens are sampled, a segment each."""
    segments = [Segment(0, place, 1, 0, ticket.owner) for place in range(num_tokens)]
    return ticket, [9], [PartialResponse(ticket.uid(0), [2] * num_tokens, [-1.0] * num_tokens, segments)]


async def test_partial_responses_go_to_the_actor_that_takes_a_group_over() -> None:
    queue, recorder, (first, second) = await recorded_queue()
    await queue.keep("a", [begun(first, 1), begun(second, 1)])
    await queue.keep("a", [begun(first, 2)])
    await queue.declare_dead("a")
    taken = await admit_all(queue, "b")
    assert [[len(response.token_ids) for response in ticket.begun] for ticket in taken] == [[2], [1]]
    assert recorder.kinds()[2:] == ["TOKENS", "TOKENS", "TOKENS", "TOKENS", "FENCE"]
    assert [record["given_token_ids"] for record in recorder.records if record["kind"] == "TOKENS"][2:] == [[9], []]


async def test_a_group_is_handed_over_after_its_last_segments_are_recorded() -> None:
    queue, recorder, (first, _) = await recorded_queue()
    recorder.gate.clear()
    keeping = asyncio.create_task(queue.keep("a", [begun(first, 1)]))
    await asyncio.sleep(0)
    dying = asyncio.create_task(queue.declare_dead("a"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not dying.done()
    recorder.gate.set()
    await keeping
    assert await dying == [0, 1]
    assert [len(ticket.begun) for ticket in await admit_all(queue, "b")] == [1, 0]


async def test_nothing_is_kept_for_a_dead_actor_or_a_finished_group() -> None:
    queue, recorder, (first, second) = await recorded_queue()
    await queue.put([(first, finished(first))])
    num_records = len(recorder.records)
    await queue.keep("a", [begun(first, 1)])
    assert len(recorder.records) == num_records
    await queue.declare_dead("a")
    with pytest.raises(TrajectoryRefused, match="a: was declared dead"):
        await queue.keep("a", [begun(second, 1)])
    assert [ticket.begun for ticket in await admit_all(queue, "b")] == [()]


async def test_a_group_that_kills_alone_is_voided_at_the_second_death() -> None:
    queue = make_queue(groups_per_step=1, max_policy_lag=0, num_steps=1)
    await queue.published(0)
    await admit_all(queue, "a")
    await queue.declare_dead("a")
    await admit_all(queue, "b")
    assert await queue.declare_dead("b") == []
    assert await queue.voided() == [("7-0-0", "its prompt was under way at the death of a, b")]
    (replacement,) = await admit_all(queue, "c")
    assert (replacement.group, replacement.admission_index, replacement.min_policy_version) == (1, 0, 0)


async def test_suspected_groups_are_handed_out_one_at_a_time() -> None:
    queue = make_queue(groups_per_step=3, max_policy_lag=0, num_steps=1)
    await queue.published(0)
    for owner in ("a", "b"):
        assert len(await admit_all(queue, owner)) == 3
        await queue.declare_dead(owner)
    (innocent,) = await admit_all(queue, "c")
    assert await admit_all(queue, "c") == [], "one suspect at a time"
    await queue.put([(innocent, finished(innocent))])
    (culprit,) = await admit_all(queue, "c")
    assert await queue.declare_dead("c") == []
    assert [uid for uid, _ in await queue.voided()] == [culprit.uid(0)]
    rest = [*await admit_all(queue, "d"), *await admit_all(queue, "d")]
    assert sorted(ticket.group for ticket in rest) == [2, 3]


async def test_actors_that_leave_make_nothing_suspicious() -> None:
    queue = make_queue(groups_per_step=1, max_policy_lag=0, num_steps=1)
    await queue.published(0)
    for owner in ("a", "b", "c", "d"):
        assert len(await admit_all(queue, owner)) == 1
        await queue.hand_over(owner)
    assert await queue.voided() == []


@pytest.mark.parametrize(("share", "num_allowed"), [(0.0, 0), (0.01, 2), (0.9, 9)])
async def test_more_voided_groups_than_allowed_end_the_run_with_the_reason(share: float, num_allowed: int) -> None:
    queue = make_queue(max_policy_lag=0, num_steps=1, max_void_share=share)
    await queue.published(0)
    for _ in range(num_allowed):
        (ticket, *_) = await admit_all(queue)
        await queue.void(ticket, "no reward")
    (ticket, *_) = await admit_all(queue)
    with pytest.raises(GroupsVoided, match=r"no reward; \d+ of \d+ groups voided \(trajectory_queue.max_void_share\)"):
        await queue.void(ticket, "no reward")


async def test_a_queue_goes_on_with_what_was_open_finished_and_vacant() -> None:
    ready = finished(Ticket(0, 0, 0, 7, ROWS[0], "a"))
    standing = ResumePoint(
        num_void=1,
        next_group=4,
        next_index=3,
        vacant=(1,),
        open=(PendingGroup(3, 2, (PartialResponse("7-3-0", [5], [-1.0], [Segment(0, 0, 1, 0, "a")]),)),),
        ready=(tuple(ready),),
    )
    queue = make_queue(groups_per_step=4, max_policy_lag=0, num_steps=1, standing=standing)
    assert tuple(asdict(await queue.counts()).values()) == (3, 0, 1, 2, 0)
    await queue.published(0)
    tickets = await admit_all(queue, "b")
    assert [(t.group, t.admission_index, len(t.begun)) for t in tickets] == [(4, 1, 0), (3, 2, 1), (5, 3, 0)]
    await queue.put([(ticket, finished(ticket)) for ticket in tickets])
    assert [group[0].group for group in await queue.take(1)] == [0, 4, 3, 5]


async def test_the_recorder_is_named_if_it_misses_its_deadline() -> None:
    queue, recorder, (first, _) = await recorded_queue(take_timeout_s=0.02)
    recorder.gate.clear()
    with pytest.raises(DeadlineExceeded, match=r"trajectory_queue: waited 0\.02 s for the recorder"):
        await queue.put([(first, finished(first))])


async def test_tickets_follow_the_task_weights_also_after_a_resume() -> None:
    prompts = [TaskPrompts("sums", ROWS, 2.0), TaskPrompts("games", [{"prompt": "play"}])]
    queue = make_queue(groups_per_step=6, prompts=prompts)
    await queue.published(0)
    tickets = await admit_all(queue)
    assert [ticket.task for ticket in tickets[:6]] == ["sums", "games", "sums"] * 2
    assert all((ticket.row["prompt"] == "play") == (ticket.task == "games") for ticket in tickets)
    standing = ResumePoint(next_group=4, next_index=4, open=tuple(PendingGroup(number, number) for number in (1, 2)))
    resumed = make_queue(groups_per_step=6, prompts=prompts, standing=standing)
    await resumed.published(0)
    expected = {ticket.group: (ticket.task, ticket.row) for ticket in tickets}
    again = await admit_all(resumed)
    assert [ticket.group for ticket in again[:3]] == [1, 2, 4]
    assert {ticket.group: (ticket.task, ticket.row) for ticket in again}.items() <= expected.items()
