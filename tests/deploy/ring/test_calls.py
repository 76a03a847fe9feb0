"""RingCalls: the order of effects of take, step and publish, and what a resumed run does not repeat."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.actors.control import RunControl
from cluster.journal.events import Record
from cluster.trajectory import Trajectory
from cluster.weights.manifest import Manifest
from deploy.ring.autoscaling import Autoscaler, IdleShareAutoscaler
from deploy.ring.calls import RingCalls
from deploy.ring.resuming import Resumption
from learner.training_loop import Groups, StepResult, train
from tests.cluster.journal.test_recorder import manifest, trajectory
from tests.deploy.ring.test_resuming import THREE_STEPS, resumed
from tests.learner.conftest import make_trajectory
from tests.support.fakes import fake_manifest


class Parts:
    """Queue, learners, store and recorder in one object; `events` lists their calls in order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.records: list[Record] = []
        self.waits: list[str] = []
        self.calls: RingCalls = self.ring_calls()

    def ring_calls(self, **changes: Any) -> RingCalls:
        self.calls = RingCalls(**{"queue": self, "learners": self, "store": self, "recorder": self} | changes)
        return self.calls

    def event(self, event: str) -> None:
        self.events.append(event)
        self.waits.append(self.calls.waits_for)

    async def take(self, step: int) -> list[list[Trajectory]]:
        self.event(f"take {step}")
        return [[make_trajectory(0, seed=step), make_trajectory(1, seed=step)], [make_trajectory(2, seed=step)]]

    async def step(self, step: int, groups: Groups) -> StepResult:
        self.event(f"step {step}")
        return StepResult(fake_manifest(step), {}, 1)

    async def publish(self, manifest: Manifest) -> None:
        self.event(f"store {manifest.version}")

    async def published(self, version: int) -> None:
        self.event(f"admit after {version}")

    async def record(self, records: Sequence[Record]) -> None:
        self.event(records[0]["kind"])
        self.records += records


async def report(step: int, groups: Groups, result: StepResult) -> None:
    return None


async def run(calls: RingCalls, num_steps: int) -> None:
    await train(first_step=1, num_steps=num_steps, learners=calls, queue=calls, weights=calls, report=report)


async def test_effects_of_each_step_happen_in_the_written_order() -> None:
    parts = Parts()
    await run(parts.calls, 2)
    effects = ("take {0}", "step {0}", "TRAIN", "store {0}", "admit after {0}", "PUBLISH")
    assert parts.events == [effect.format(step) for step in (1, 2) for effect in effects]
    assert [(r["uid"], r["position"]) for r in parts.records if r.get("step") == 2] == [
        ("2-0-0", 0),
        ("2-1-0", 1),
        ("2-2-0", 2),
    ]


async def test_the_call_in_progress_is_named_while_it_lasts() -> None:
    parts = Parts()
    await run(parts.calls, 1)
    groups, learners, published = (
        "the groups of step 1",
        "the learner group to train step 1",
        "version 1 to be published",
    )
    assert parts.waits == [groups, learners, learners, published, published, published]
    assert parts.calls.num_calls == 3


async def test_a_republication_within_a_step_is_named_and_counted() -> None:
    class Restarting(Parts):
        async def step(self, step: int, groups: Groups) -> StepResult:
            await self.calls.publish(fake_manifest(step - 1))
            return await super().step(step, groups)

    parts = Restarting()
    await parts.calls.step(3, [[make_trajectory(0)]])
    assert parts.events == ["store 2", "admit after 2", "PUBLISH", "step 3", "TRAIN"]
    assert parts.waits == ["version 2 to be published"] * 3 + ["the learner group to train step 3"] * 2
    assert parts.calls.num_calls == 2


async def test_a_failed_call_records_nothing_and_publishes_nothing() -> None:
    class Failing(Parts):
        async def step(self, step: int, groups: Groups) -> StepResult:
            raise RuntimeError("no")

    parts = Failing()
    with pytest.raises(RuntimeError, match="no"):
        await run(parts.calls, 1)
    assert parts.events == ["take 1"]


async def test_tokens_sampled_during_a_step_are_in_its_metrics() -> None:
    totals = iter((100.0, 130.0))

    async def sampled_tokens() -> float:
        return next(totals)

    calls = Parts().ring_calls(sampled_tokens=sampled_tokens)
    result = await calls.step(1, [[make_trajectory(0)]])
    assert result.metrics == {"rollout_actors/num_tokens_sampled_during_step": 30.0}


@pytest.fixture
def from_step_one(tmp_path: Path) -> Resumption:
    """A run whose journal has three trained steps and whose checkpoint is of step 1."""
    checkpoint = tmp_path / "checkpoints" / "ppo" / "step-000001"
    checkpoint.mkdir(parents=True)
    return resumed(tmp_path, *THREE_STEPS, checkpoint=checkpoint)


async def test_groups_of_trained_steps_come_from_the_journal(from_step_one: Resumption) -> None:
    parts = Parts()
    calls = parts.ring_calls(resumed=from_step_one)
    assert await calls.take(2) == [[replace(trajectory(1), step=2)]]
    assert await calls.take(3) == [[replace(trajectory(2), step=3)]]
    assert parts.events == []
    await calls.take(4)
    assert parts.events == ["take 4"]


async def test_published_versions_are_compared_and_not_published_again(from_step_one: Resumption) -> None:
    parts, notes = Parts(), list[str]()
    calls = parts.ring_calls(resumed=from_step_one, note=notes.append)
    changed = replace(manifest(2).tensors[0], checksum="another")
    for repeated in (manifest(1), replace(manifest(2), tensors=(changed,)), manifest(3), manifest(4)):
        await calls.publish(repeated)
    assert parts.events == [
        *("store 3", "admit after 3", "PUBLISH"),
        *("store 4", "admit after 4", "PUBLISH"),
    ]
    assert notes == ["ppo: version 2 trained again differs in 1 of 1 tensors from the published one"]


class Waits(Parts):
    """A queue whose groups come after given seconds, and the clock that shows them; training takes one second."""

    def __init__(self, waits_s: Iterable[float]) -> None:
        super().__init__()
        self._waits_s: Iterator[float] = iter(waits_s)
        self.now_s = 0.0

    async def take(self, step: int) -> list[list[Trajectory]]:
        self.now_s += next(self._waits_s)
        return []


async def suggested(control: RunControl, num_steps: int) -> tuple[list[str], int]:
    """Return the notes of steps in which the learner idled half of the time, and the number of actors wanted then."""
    waits, notes = Waits([100.0] + [1.0] * num_steps), list[str]()

    def clock() -> float:
        return waits.now_s

    policy = IdleShareAutoscaler(min_actors=1, max_actors=2)
    autoscaler = Autoscaler(policy, control, num_actors=lambda: 1, note=notes.append, clock=clock)
    calls = waits.ring_calls(autoscaler=autoscaler, clock=clock)
    for step in range(1, num_steps + 1):
        await calls.take(step)
        waits.now_s += 1.0
    return notes, await asyncio.wait_for(control.wait_num_rollout_actors(0), 1)


async def test_an_actor_is_added_after_five_steps_not_counting_the_first() -> None:
    assert await suggested(RunControl(1), 5) == ([], 1)
    assert await suggested(RunControl(1), 6) == (["step 6: the learner waited for groups; 2 rollout actors"], 2)


async def test_a_number_that_a_person_set_stays() -> None:
    control = RunControl(1)
    await control.set_num_rollout_actors(3)
    assert await suggested(control, 20) == ([], 3)
