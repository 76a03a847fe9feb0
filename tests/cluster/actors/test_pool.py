"""Test restarting and scaling actors, with stand-in actors."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.actors import pool
from cluster.actors.control import RunControl
from cluster.actors.health import Health
from cluster.actors.pool import ActorPool
from cluster.errors import ActorDied, DeadlineExceeded, InputError


class StandIn:
    def __init__(self, name: str, events: list[str]) -> None:
        self.name = name
        self.events = events
        self.may_return = asyncio.Event()
        self.error: Exception | None = None

    async def work(self) -> None:
        await self.may_return.wait()
        if self.error:
            raise self.error

    async def stop(self) -> None:
        self.events.append(f"leave {self.name}")
        self.end()

    def end(self, error: Exception | None = None) -> None:
        self.error = error
        self.may_return.set()


class Stage:
    """A pool over stand-ins, with everything that happens to it in `events`."""

    def __init__(self, num_actors: int = 1) -> None:
        self.events: list[str] = []
        self.notes: list[str] = []
        self.without_room: set[str] = set()
        self.noted = asyncio.Event()
        self.actors: dict[str, StandIn] = {}
        self.control = RunControl(num_actors)
        self.started = asyncio.Condition()
        self.pool = ActorPool(self.start, self.stop, name="rollout", max_restarts=1, note=self.note)

    def note(self, text: str) -> None:
        self.notes.append(text)
        if "continues with" in text:
            self.noted.set()

    async def start(self, name: str) -> Any:
        self.events.append(f"start {name}")
        if name in self.without_room:
            raise DeadlineExceeded(name, "waited 1 s for its engine to start")
        self.actors[name] = StandIn(name, self.events)
        async with self.started:
            self.started.notify_all()
        return self.actors[name]

    async def stop(self, actor: Any) -> None:
        self.events.append(f"stop {actor.name}")

    async def lost(self, name: str) -> None:
        self.events.append(f"lost {name}")

    async def until_started(self, name: str) -> StandIn:
        async with self.started:
            await asyncio.wait_for(self.started.wait_for(lambda: name in self.actors), 5)
        return self.actors[name]

    def supervise(self) -> asyncio.Task[None]:
        return asyncio.create_task(
            self.pool.supervise(
                lambda actor: actor.work(),
                lost=self.lost,
                wanted=self.control.wait_num_rollout_actors,
            )
        )


async def test_a_failed_actor_is_replaced_once_after_its_work_was_taken_back() -> None:
    stage = Stage()
    await stage.pool.fill(1)
    supervising = stage.supervise()
    stage.actors["rollout-0"].end(ActorDied("rollout-0", "killed"))
    (await stage.until_started("rollout-0+1")).end()
    await asyncio.wait_for(supervising, 5)
    assert stage.events == ["start rollout-0", "lost rollout-0", "stop rollout-0", "start rollout-0+1"]


async def test_a_second_failure_ends_the_run_with_its_own_error() -> None:
    stage = Stage()
    await stage.pool.fill(1)
    supervising = stage.supervise()
    stage.actors["rollout-0"].end(ActorDied("rollout-0", "killed"))
    (await stage.until_started("rollout-0+1")).end(ActorDied("rollout-0+1", "killed again"))
    with pytest.raises(ActorDied, match=r"rollout-0\+1: killed again"):
        await asyncio.wait_for(supervising, 5)


async def test_an_error_that_no_policy_heals_ends_the_run_at_once() -> None:
    stage = Stage(num_actors=2)
    await stage.pool.fill(2)
    supervising = stage.supervise()
    stage.actors["rollout-1"].end(InputError("scorer", "is wrong"))
    with pytest.raises(InputError, match="scorer: is wrong"):
        await asyncio.wait_for(supervising, 5)
    assert "start rollout-1+1" not in stage.events


async def test_actors_join_and_leave_as_the_run_is_scaled() -> None:
    stage = Stage()
    await stage.pool.fill(1)
    supervising = stage.supervise()
    assert await stage.control.set_num_rollout_actors(3) == 1
    await stage.until_started("rollout-2")
    await stage.control.set_num_rollout_actors(1)
    await asyncio.wait_for(asyncio.gather(*(stage.actors[f"rollout-{i}"].may_return.wait() for i in (1, 2))), 5)
    await stage.pool.dismiss()
    await asyncio.wait_for(supervising, 5)
    assert stage.events.pop() == "leave rollout-0"
    assert stage.events[:3] == ["start rollout-0", "start rollout-1", "start rollout-2"]
    assert sorted(stage.events[3:]) == ["leave rollout-1", "leave rollout-2", "stop rollout-1", "stop rollout-2"]
    assert [actor.name for actor in stage.pool.actors] == ["rollout-0"]


async def test_what_a_failing_actor_was_asked_is_asked_of_its_replacement() -> None:
    stage = Stage()
    await stage.pool.fill(1)
    supervising = stage.supervise()
    await asyncio.sleep(0)
    asked = asyncio.create_task(stage.pool.ask("work"))
    await asyncio.sleep(0)
    stage.actors["rollout-0"].end(ActorDied("rollout-0", "killed"))
    (await stage.until_started("rollout-0+1")).end()
    await asyncio.wait_for(asyncio.gather(asked, supervising), 5)


async def test_ask_raises_the_actors_error_without_supervision() -> None:
    stage = Stage()
    await stage.pool.fill(1)
    stage.actors["rollout-0"].end(ActorDied("rollout-0", "killed"))
    with pytest.raises(ActorDied, match="rollout-0: killed"):
        await stage.pool.ask("work")


async def test_actors_that_find_no_room_are_noted_and_the_others_join() -> None:
    stage = Stage()
    stage.without_room.add("rollout-1")
    await stage.pool.fill(1)
    supervising = stage.supervise()
    await stage.control.set_num_rollout_actors(3)
    await stage.until_started("rollout-2")
    await asyncio.wait_for(stage.noted.wait(), 5)
    await stage.pool.dismiss()
    await asyncio.wait_for(supervising, 5)
    assert stage.notes == ["rollout-1: waited 1 s for its engine to start; the run continues with 2"]


async def test_the_run_continues_if_a_replacement_finds_no_room() -> None:
    stage = Stage(num_actors=2)
    stage.without_room.add("rollout-1+1")
    await stage.pool.fill(2)
    supervising = stage.supervise()
    stage.actors["rollout-1"].end(ActorDied("rollout-1", "its node is gone"))
    await asyncio.wait_for(stage.noted.wait(), 5)
    assert not supervising.done()
    await stage.pool.dismiss()
    await asyncio.wait_for(supervising, 5)
    assert [actor.name for actor in stage.pool.actors] == ["rollout-0"]


async def test_the_run_ends_if_the_last_actors_replacement_finds_no_room() -> None:
    stage = Stage()
    stage.without_room.add("rollout-0+1")
    await stage.pool.fill(1)
    supervising = stage.supervise()
    stage.actors["rollout-0"].end(ActorDied("rollout-0", "its node is gone"))
    with pytest.raises(DeadlineExceeded, match=r"rollout-0\+1"):
        await asyncio.wait_for(supervising, 5)


async def test_an_actor_is_replaced_if_it_does_not_answer_its_probes() -> None:
    stage = Stage()
    hung = asyncio.Event()

    async def probe(actor: Any) -> bool:
        if actor.name == "rollout-0":
            await hung.wait()
        return True

    stage.pool.health = Health(probe, timeout_s=0.01, setting="x.timeout_s", note=stage.note)
    await stage.pool.fill(1)
    running = stage.supervise()
    await stage.until_started("rollout-0+1")
    await stage.pool.dismiss()
    await running
    assert stage.events[:4] == ["start rollout-0", "lost rollout-0", "stop rollout-0", "start rollout-0+1"]


async def test_a_replacement_does_not_work_if_it_starts_during_dismissal() -> None:
    stage = Stage(2)
    await stage.pool.fill(2)
    starting, start = asyncio.Event(), stage.start

    async def start_when_dismissed(name: str) -> Any:
        starting.set()
        await dismissed.wait()
        return await start(name)

    dismissed = asyncio.Event()
    stage.pool._start = start_when_dismissed
    running = stage.supervise()
    await asyncio.sleep(0)
    stage.actors["rollout-0"].end(ActorDied("rollout-0", "killed"))
    await starting.wait()
    await stage.pool.dismiss()
    dismissed.set()
    await asyncio.wait_for(running, 5)
    assert [actor.name for actor in stage.pool.actors] == ["rollout-1", "rollout-0+1"]


async def test_the_budget_of_restarts_is_for_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    await stage.pool.fill(1)
    error = ActorDied("rollout-0", "killed")
    replacement = await stage.pool.replace(stage.pool.actors[0], error)
    monkeypatch.setattr(pool, "BUDGET_WINDOW_S", 0.0)
    monkeypatch.setattr(pool, "BACKOFF_S", 0.0)
    assert (await stage.pool.replace(replacement, error)).name == "rollout-0+2"
    monkeypatch.setattr(pool, "BUDGET_WINDOW_S", 3600.0)
    with pytest.raises(ActorDied, match="killed"):
        await stage.pool.replace(stage.pool.actors[0], error)
