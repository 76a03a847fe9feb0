"""Test the probes: states, deadlines, and actors that do not answer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.actors.health import Health, State
from cluster.errors import ActorDied, EngineError


class StandIn:
    """An actor that answers its probes while its gate is open."""

    def __init__(self) -> None:
        self.name = "rollout-0"
        self.answers = asyncio.Event()
        self.is_ready = True
        self.error: Exception | None = None
        self.num_asked = 0

    async def probe(self) -> bool:
        self.num_asked += 1
        await self.answers.wait()
        if self.error:
            raise self.error
        return self.is_ready


class Rig:
    def __init__(self, timeout_s: float) -> None:
        self.actor: Any = StandIn()
        self.notes: list[str] = []
        self.health = Health(
            lambda actor: actor.probe(), timeout_s=timeout_s, setting="x.timeout_s", note=self.notes.append, every_s=0
        )

    async def until(self, state: State) -> None:
        async with asyncio.timeout(10):
            while self.health.states.get("rollout-0") != state:
                await asyncio.sleep(0)


async def test_an_actor_is_stale_until_it_has_something_to_serve_with() -> None:
    rig = Rig(timeout_s=10)
    rig.actor.answers.set()
    rig.actor.is_ready = False
    watching = asyncio.create_task(rig.health.watch(rig.actor))
    await rig.until(State.STALE)
    rig.actor.is_ready = True
    await rig.until(State.HEALTHY)
    assert rig.health.num(State.HEALTHY) == 1
    watching.cancel()


async def test_a_missed_probe_makes_suspect_and_an_answer_healthy_again() -> None:
    rig = Rig(timeout_s=0.01)
    watching = asyncio.create_task(rig.health.watch(rig.actor))
    await rig.until(State.SUSPECT)
    rig.actor.answers.set()
    await rig.until(State.HEALTHY)
    assert rig.notes == ["rollout-0 is suspect: waited 0.01 s for its engine (x.timeout_s)"]
    watching.cancel()


async def test_two_missed_probes_in_a_row_are_a_death() -> None:
    rig = Rig(timeout_s=0.01)
    with pytest.raises(ActorDied, match=r"rollout-0: answered 2 probes not within 0.01 s \(x.timeout_s\)"):
        await rig.health.watch(rig.actor)
    assert (rig.health.states["rollout-0"], rig.actor.num_asked) == (State.DEAD, 2)


async def test_the_error_of_an_engine_that_ended_is_raised() -> None:
    rig = Rig(timeout_s=10)
    rig.actor.answers.set()
    rig.actor.error = EngineError("rollout-0", "the engine failed")
    with pytest.raises(EngineError, match="the engine failed"):
        await rig.health.watch(rig.actor)
    assert rig.health.states["rollout-0"] == State.DEAD
