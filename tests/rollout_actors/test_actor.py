"""Tests of the rollout actor with real queue and weight store, fake engine and fake rewards."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import EngineError, GroupsVoided, InputError, RewardError, TrajectoryRefused, WeightsLost
from cluster.scoring import ScoreRequest
from cluster.trajectory import PartialGroup, Ticket, segment_seed
from cluster.weights.manifest import Manifest
from rollout_actors import actor as rollout_actor
from rollout_actors import partials
from rollout_actors.actor import RolloutActor
from tests.support import tiny
from tests.support.actor_rig import Rig
from tests.support.fakes import fake_manifest, fake_probe


async def test_all_groups_of_a_run_are_sampled_scored_and_put(tied_folder: Path) -> None:
    rig = Rig(tied_folder)
    async with rig.actor() as actor:
        running = rig.run(actor)
        await rig.publish(0)
        first = await rig.queue.take(1)
        await rig.publish(1)
        second = await rig.queue.take(2)
        await actor.stop()
        await running
    assert [group[0].group for group in first + second] == [0, 1, 2, 3]
    assert all(len(group) == 2 for group in first + second)
    assert (await rig.queue.counts()).num_open == 0


async def test_a_trajectory_records_tokens_segments_and_reward(tied_folder: Path) -> None:
    rig = Rig(tied_folder, num_steps=1, groups=1)
    async with rig.actor() as actor:
        running = rig.run(actor)
        await rig.publish(0)
        [[trajectory, other]] = await rig.queue.take(1)
        await actor.stop()
        await running
    assert (trajectory.uid, other.uid, trajectory.task) == ("3-0-0", "3-0-1", "test")
    assert trajectory.token_ids[:2] == [5, 6]
    assert trajectory.mask == [False] * 3 + [True] * 3
    assert trajectory.behavior_logprobs == [0.0] * 3 + [-0.5] * 3
    [segment] = trajectory.segments
    assert (segment.policy_version, segment.start, segment.length) == (0, 3, 3)
    assert (segment.seed, segment.actor) == (segment_seed("3-0-0", 0), "rollout-0")
    assert [(turn.start, turn.length) for turn in trajectory.turns] == [(3, 3)]
    request = rig.rewards.requests[0]
    assert request.id == "3-0-0"
    assert request.response == " ".join(f"t{token}" for token in trajectory.token_ids[3:])
    reference = int(request.prompt.split("t")[-1]) - 10
    assert dict(request.columns) == {
        "reference": reference,
        "completion_ids": trajectory.token_ids[3:],
        "finish_reason": trajectory.finish_reason,
        "trainer_state": {"global_step": 0, "max_steps": 1},
    }
    assert (trajectory.reward, trajectory.scorer_version) == (float(len(request.response)), "fake")


async def test_tokens_do_not_depend_on_the_number_of_actors(tied_folder: Path) -> None:
    async def tokens(*names: str) -> list[list[int]]:
        rig = Rig(tied_folder, num_steps=2, lag=0, num_concurrent_groups=1)
        actors = [await started_actor(rig, name) for name in names]
        running = [rig.run(actor) for actor in actors]
        await rig.publish(0)
        groups = await rig.queue.take(1)
        await rig.publish(1)
        groups += await rig.queue.take(2)
        await asyncio.gather(*(actor.close() for actor in actors))
        await asyncio.gather(*running)
        return [trajectory.token_ids for group in groups for trajectory in group]

    assert await tokens("rollout-0") == await tokens("rollout-0", "rollout-1")


async def started_actor(rig: Rig, name: str) -> RolloutActor:
    """Start an actor that the test closes."""
    return await rig.actor(name).__aenter__()


async def test_no_group_is_sampled_with_weights_older_than_its_floor(tied_folder: Path) -> None:
    rig = Rig(tied_folder, num_steps=3, lag=0)
    async with rig.actor() as actor:
        running = rig.run(actor)
        for step in (1, 2, 3):
            await rig.publish(step - 1)
            groups = await rig.queue.take(step)
            versions = {s.policy_version for group in groups for t in group for s in t.segments}
            assert versions == {step - 1}
        await actor.stop()
        await running


async def test_run_raises_the_scorers_error_if_all_rewards_fail(tied_folder: Path) -> None:
    rig = Rig(tied_folder)
    rig.rewards.error = RewardError("scorer", "is broken")
    async with rig.actor() as actor:
        running = rig.run(actor)
        await rig.publish(0)
        with pytest.raises(GroupsVoided, match=r"scorer: is broken; \d of \d groups voided"):
            await running
    assert (await rig.queue.counts()).num_trained == 0


@pytest.mark.parametrize("lag", [0, 1])
async def test_the_next_prompt_replaces_one_that_cannot_be_scored(tied_folder: Path, lag: int) -> None:
    rig = Rig(tied_folder, lag=lag)
    rig.rewards.refused["3-0-1"] = RewardError("scorer", "gave nothing for 3-0-1")
    async with rig.actor() as actor:
        running = rig.run(actor)
        await rig.publish(0)
        groups = await rig.queue.take(1)
        assert [group[0].admission_index for group in groups] == list(range(len(groups)))
        assert "3-0-0" not in {trajectory.uid for group in groups for trajectory in group}
        await actor.stop()
        await running
    assert await rig.queue.voided() == [("3-0-0", "scorer: gave nothing for 3-0-1")]


async def test_another_actor_continues_the_finished_segments_of_a_dead_one(
    tied_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partials, "KEEP_EVERY_S", 0.0)
    rig = Rig(tied_folder, groups=1, num_steps=1, responses_per_prompt=2, max_response_tokens=6, max_segment_tokens=2)
    saved, blocked = asyncio.Event(), threading.Event()
    keep = rig.queue.keep

    async def keep_and_signal(owner: str, groups: Sequence[PartialGroup]) -> None:
        await keep(owner, groups)
        if sum(len(response.token_ids) for _, _, responses in groups for response in responses) == 8:
            saved.set()

    rig.queue.keep = keep_and_signal  # type: ignore[method-assign]
    steps = iter(range(1, 100))
    async with rig.actor(before_step=lambda: blocked.wait() if next(steps) > 4 else None) as dead:
        dying = rig.run(dead)
        await rig.publish(0)
        await asyncio.wait_for(saved.wait(), 20)
        await rig.queue.declare_dead("rollout-0")
        async with rig.actor("rollout-1") as successor:
            running = rig.run(successor)
            (group,) = await rig.queue.take(1)
            await successor.stop()
            await running
        blocked.set()
        with contextlib.suppress(TrajectoryRefused):
            await dying
    for trajectory in group:
        assert [(s.actor, s.length) for s in trajectory.segments] == [
            *(("rollout-0", 2), ("rollout-0", 2)),
            ("rollout-1", 2),
        ]
        assert [s.seed for s in trajectory.segments] == [segment_seed(trajectory.uid, number) for number in range(3)]
    adds = [event for event in rig.engines["rollout-1"].events if event[0] == "add"]
    assert sorted(len(tokens) for _, tokens, _ in adds) == [7, 7], "prompt and saved tokens"


async def test_run_raises_an_error_naming_the_actor_if_a_swap_is_not_proved(tied_folder: Path) -> None:
    rig = Rig(tied_folder)
    async with rig.actor() as actor:
        running = rig.run(actor)
        await rig.publish(0)
        await rig.queue.take(1)
        rig.engines["rollout-0"].skip_loads = True
        await rig.publish(1)
        with pytest.raises(EngineError, match="rollout-0: does not hold version 1"):
            await running


async def test_run_raises_an_error_naming_the_prompt_if_it_is_too_long(tied_folder: Path) -> None:
    rig = Rig(tied_folder, max_prompt_tokens=2)
    async with rig.actor() as actor:
        running = rig.run(actor)
        await rig.publish(0)
        with pytest.raises(InputError, match="prompt 't5 t6"):
            await running


async def test_another_actor_finishes_the_groups_of_one_that_stops(tied_folder: Path) -> None:
    rig = Rig(tied_folder, num_steps=1)
    rig.rewards.gate = asyncio.Event()
    rig.rewards.score_one = lambda request: 1.0
    async with rig.actor() as stopping, rig.actor("rollout-1") as staying:
        stopped = rig.run(stopping)
        await rig.publish(0)
        while len(rig.rewards.requests) < 4:
            await asyncio.sleep(0)
        await stopping.stop()
        await stopped
        assert {len(engine.requests) for engine in rig.engines.values()} == {0}
        rig.rewards.gate.set()
        running = rig.run(staying)
        groups = await rig.queue.take(1)
        await staying.stop()
        await running
    assert {segment.actor for group in groups for t in group for segment in t.segments} == {"rollout-1"}
    counts = await rig.queue.counts()
    assert (counts.num_admitted, counts.num_trained, counts.num_void) == (2, 2, 0)


async def test_stop_before_run_ends_only_the_next_run(tied_folder: Path) -> None:
    rig = Rig(tied_folder, num_steps=1)
    async with rig.actor() as actor:
        await rig.publish(0)
        await actor.stop()
        await asyncio.wait_for(rig.run(actor), 10)
        assert (await rig.queue.counts()).num_admitted == 0
        running = rig.run(actor)
        assert len(await rig.queue.take(1)) == 2
        await actor.stop()
        await running


async def test_a_ticket_granted_while_an_actor_stops_is_returned(tied_folder: Path) -> None:
    rig = Rig(tied_folder, num_steps=1)
    called = asyncio.Event()
    admit = rig.queue.admit

    async def slow_admit(owner: str, *, max_groups: int, timeout_s: float) -> list[Ticket]:
        called.set()
        return await admit(owner, max_groups=max_groups, timeout_s=timeout_s)

    rig.queue.admit = slow_admit  # type: ignore[method-assign]
    async with rig.actor() as actor:
        running = rig.run(actor)
        await called.wait()
        stopping = asyncio.ensure_future(actor.stop())
        await asyncio.sleep(0)
        await rig.publish(0)
        await asyncio.gather(stopping, running)
    assert await rig.queue.hand_over("rollout-0") == []
    (ticket,) = await rig.queue.admit("rollout-1", max_groups=1, timeout_s=1)
    assert ticket.admission_index == 0


async def test_num_concurrent_groups_limits_the_groups_being_sampled(tied_folder: Path) -> None:
    rig = Rig(tied_folder, num_steps=2, num_concurrent_groups=1)
    async with rig.actor() as actor:
        running = rig.run(actor)
        await rig.publish(0)
        await rig.queue.take(1)
        await rig.queue.take(2)
        await actor.stop()
        await running
    num_at_once = [event[2] for event in rig.engines["rollout-0"].events if event[0] == "step"]
    assert max(num_at_once) == rig.config.responses_per_prompt


async def test_sampling_continues_while_a_group_is_being_scored(tied_folder: Path) -> None:
    rig = Rig(tied_folder, num_steps=2, num_concurrent_groups=1)
    rig.rewards.gate = asyncio.Event()
    async with rig.actor() as actor:
        running = rig.run(actor)
        await rig.publish(0)
        while len({request.id for request in rig.rewards.requests}) < 4 * rig.config.responses_per_prompt:
            await asyncio.sleep(0)
        rig.rewards.gate.set()
        assert len(await rig.queue.take(1)) == len(await rig.queue.take(2)) == 2
        await actor.stop()
        await running


async def test_active_responses_continue_with_a_newly_published_version(tied_folder: Path) -> None:
    rig = Rig(tied_folder, num_steps=1, groups=1, max_response_tokens=8)
    loop = asyncio.get_running_loop()
    steps = 0

    def publish_at_step_3() -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            asyncio.run_coroutine_threadsafe(rig.publish(1), loop).result()
            loaded.wait()

    loaded = threading.Event()
    async with rig.actor(before_step=publish_at_step_3) as actor:
        running = rig.run(actor)
        await rig.publish(0)
        while rig.fetched != [0, 1]:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        loaded.set()
        [group] = await rig.queue.take(1)
        await actor.stop()
        await running
        metrics = await actor.metrics()
    assert {s.policy_version for t in group for s in t.segments} == {0, 1}
    assert metrics["num_swaps_proved"] == 2


async def test_the_same_seed_gives_the_same_evaluation_samples(tied_folder: Path) -> None:
    rig = Rig(tied_folder)
    async with rig.actor() as actor:
        first = await actor.sample(["t5 t6", "t7"], seed=1, num=2)
        again = await actor.sample(["t5 t6", "t7"], seed=1, num=2)
        other = await actor.sample(["t5 t6", "t7"], seed="2-held-out", num=2)
    assert first == again != other
    assert [len(responses) for responses in first] == [2, 2]
    assert first[0][0].prompt_token_ids == [5, 6]
    assert first[0][0].text == " ".join(f"t{token}" for token in first[0][0].token_ids)
    assert len(first[0][0].logprobs) == 3


async def test_sample_waits_for_min_policy_version(tied_folder: Path) -> None:
    rig = Rig(tied_folder)
    async with rig.actor() as actor:
        pending = asyncio.ensure_future(actor.sample(["t5"], seed=1, min_policy_version=1))
        running = rig.run(actor)
        await rig.publish(1)
        [[response]] = await pending
        assert response.logprobs == [-0.6] * 3
        await actor.stop()
        await running


async def test_load_policy_loads_the_weights_of_a_folder(tied_folder: Path, tmp_path: Path) -> None:
    rig = Rig(tied_folder)
    async with rig.actor() as actor:
        await actor.load_policy(str(tied_folder), version=4)
        assert await actor.logprobs([[4, 5]]) == fake_probe(4, [[4, 5]])
        with pytest.raises(InputError, match=r"no \*\.safetensors"):
            await actor.load_policy(str(tmp_path))


async def test_a_version_of_an_earlier_run_satisfies_no_floor(tied_folder: Path) -> None:
    rig = Rig(tied_folder, num_steps=1, groups=1)
    async with rig.actor() as actor:
        await actor.load_policy(str(tied_folder), version=40)
        running = rig.run(actor)
        await rig.publish(0)
        [group] = await rig.queue.take(1)
        await actor.stop()
        await running
    assert {s.policy_version for t in group for s in t.segments} == {0}


@pytest.mark.chaos  # `tests/runs/test_ring.py` tests it in a whole ring
async def test_a_real_engine_samples_for_a_run(tied_folder: Path) -> None:
    model = tiny.load_model(tied_folder)
    rig = Rig(tied_folder, num_steps=1)
    actor = RolloutActor(
        "rollout-0",
        rig.config,
        model_path=str(tied_folder),
        dtype="float32",
        seed=0,
        fetch_tensors=lambda manifest: tiny.checkpoint(model),
    )
    await actor.start()
    running = rig.run(actor)
    await rig.weights.publish(tiny.manifest(0, model, None))
    await rig.queue.published(0)
    groups = await rig.queue.take(1)
    await actor.stop()
    await running
    await actor.close()
    for trajectory in (t for group in groups for t in group):
        expected = tiny.logprobs(model, trajectory.token_ids)
        assert trajectory.behavior_logprobs[3:] == pytest.approx(expected[2:], abs=1e-5)
    assert all(isinstance(request, ScoreRequest) for request in rig.rewards.requests)


async def test_an_actor_waits_for_lost_weights_until_they_are_published_again(
    tied_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_actor, "LOST_WAIT_S", 0.01)
    rig, lost = Rig(tied_folder, num_steps=1), asyncio.Event()
    loop = asyncio.get_running_loop()

    def fetch(manifest: Manifest) -> dict[str, Any]:
        if manifest.incarnation == "first":
            loop.call_soon_threadsafe(lost.set)
            raise WeightsLost("version 0", "gone")
        return {}

    async with rig.actor() as actor:
        actor._fetch_tensors = fetch
        running = rig.run(actor)
        await rig.publish(0)
        await lost.wait()
        assert not running.done()
        await rig.weights.publish(fake_manifest(0, "second"))
        assert len(await rig.queue.take(1)) == 2
        await actor.stop()
        await running


async def test_run_raises_weights_lost_if_they_are_not_published_again(
    tied_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_actor, "FLOOR_TIMEOUT_S", 0.0)
    rig = Rig(tied_folder)

    def fetch(manifest: Manifest) -> dict[str, Any]:
        raise WeightsLost("version 0", "gone")

    async with rig.actor() as actor:
        actor._fetch_tensors = fetch
        running = rig.run(actor)
        await rig.publish(0)
        with pytest.raises(WeightsLost, match="version 0: gone"):
            await running
