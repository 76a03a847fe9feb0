"""Tests of the rollout actor with environments."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from cluster.data.prompt_order import TaskPrompts
from cluster.errors import GroupsVoided
from cluster.trajectory import segment_seed
from rollout_actors.config import EnvironmentConfig
from tests.support.actor_rig import ROWS, Rig


def environment(name: str, **settings: Any) -> dict[str, EnvironmentConfig]:
    """Return the environment of the rig's task."""
    path = f"tests.support.environments:{name}"
    return {"test": EnvironmentConfig(path=path, settings=settings, max_tokens=40, step_timeout_s=10)}


async def test_a_trajectory_has_several_turns_with_an_environment(chat_folder: Path) -> None:
    rig = Rig(chat_folder, num_steps=2, groups=2, max_prompt_tokens=16)
    async with rig.actor(environments=environment("Echo", num_turns=3)) as actor:
        running = rig.run(actor)
        await rig.publish(0)
        first = await rig.queue.take(1)
        await rig.publish(1)
        second = await rig.queue.take(2)
        await actor.stop()
        await running
    trajectories = [trajectory.check() for group in first + second for trajectory in group]
    assert [t.group for t in trajectories] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(len(t.turns) == 3 and t.num_response_tokens == 9 for t in trajectories)
    assert all(turn.reward is not None for t in trajectories for turn in t.turns)
    assert all(t.reward_parts["answers"] == 3.0 for t in trajectories)
    seeds = [segment.seed for segment in trajectories[0].segments]
    assert seeds == [segment_seed("3-0-0", number) for number in range(len(seeds))]
    starts = [t.token_ids[: t.turns[0].start] for t in trajectories]
    assert starts[0::2] == starts[1::2], "the responses of a group start from the same state"
    (request, *_) = rig.rewards.requests
    assert [message["role"] for message in request.columns["conversation"]][::2] == ["user"] * 3


async def test_turns_with_a_rendered_history_are_sequences_of_a_trajectory(chat_folder: Path) -> None:
    rig = Rig(chat_folder, num_steps=1, groups=1, max_prompt_tokens=16)
    rendered = {"test": environment("Echo", num_turns=3)["test"].model_copy(update={"history": "as_rendered"})}
    async with rig.actor(environments=rendered) as actor:
        running = rig.run(actor)
        await rig.publish(0)
        [group] = await rig.queue.take(1)
        await actor.stop()
        await running
    assert len(group) == 2
    for trajectory in group:
        first, second, third = trajectory.check().turns
        assert trajectory.sequence_starts == [first.start + first.length, second.start + second.length]
        prompts = [trajectory.tokens_before(turn.start) for turn in (first, second, third)]
        assert prompts[1][: len(prompts[0])] == prompts[0], "the conversation starts anew in each sequence"
        assert trajectory.reward_parts["answers"] == 3.0


async def test_a_group_is_voided_if_its_environment_breaks_the_protocol(chat_folder: Path) -> None:
    rig = Rig(chat_folder, num_steps=2, groups=2, max_prompt_tokens=16)
    async with rig.actor(environments=environment("Odd", how="raises")) as actor:
        running = rig.run(actor)
        await rig.publish(0)
        with pytest.raises(GroupsVoided, match="no luck"):
            await asyncio.wait_for(running, 20)
    assert all("environments.py" in reason for _, reason in await rig.queue.voided())


async def test_groups_of_running_conversations_are_returned_if_an_actor_stops(chat_folder: Path) -> None:
    rig = Rig(chat_folder, num_steps=1, groups=2, max_prompt_tokens=16)
    holding = threading.Event()
    async with rig.actor(environments=environment("Echo", num_turns=3), before_step=holding.wait) as actor:
        running = rig.run(actor)
        await rig.publish(0)
        while not (await rig.queue.counts()).num_open:
            await asyncio.sleep(0.01)
        stopping = asyncio.ensure_future(actor.stop())
        holding.set()
        await stopping
        await running
    async with rig.actor("rollout-1", environments=environment("Echo", num_turns=3)) as other:
        running = rig.run(other)
        groups = await rig.queue.take(1)
        await other.stop()
        await running
    assert [group[0].group for group in groups] == [0, 1]


async def test_answer_runs_conversations_or_single_turns_by_task_and_seed(chat_folder: Path, tied_folder: Path) -> None:
    rig = Rig(chat_folder, max_prompt_tokens=16)
    async with rig.actor(environments=environment("Echo", num_turns=2)) as actor:
        answers = [await actor.answer([{"prompt": ""}] * 3, task="test", seed="x", num=2) for _ in range(2)]
        other = await actor.answer([{"prompt": ""}] * 3, task="test", seed="y", num=2)
    assert answers[0] == answers[1] != other
    assert [len(group) for group in answers[0]] == [2, 2, 2]
    assert all(first.messages[0] == second.messages[0] for first, second in answers[0])
    rig = Rig(tied_folder)
    async with rig.actor() as actor:
        ((answer,),) = await actor.answer([ROWS[0]], task="test", seed="x")
        ((response,),) = await actor.sample(["t5 t6 t10"], seed="x")
    assert (answer.response, answer.last_response) == (response.text, response.token_ids)
    assert answer.messages == []


async def test_only_tasks_with_an_environment_get_several_turns(
    chat_folder: Path,
) -> None:
    prompts = [TaskPrompts("test", [{"prompt": ""}]), TaskPrompts("plain", [{"prompt": "ab"}])]
    rig = Rig(chat_folder, num_steps=1, groups=4, prompts=prompts, max_prompt_tokens=16)
    async with rig.actor(environments=environment("Echo", num_turns=3)) as actor:
        running = rig.run(actor)
        await rig.publish(0)
        groups = await rig.queue.take(1)
        await actor.stop()
        await running
    assert [{t.task for t in group} for group in groups] == [{"test"}, {"plain"}] * 2
    assert [{len(t.turns) for t in group} for group in groups] == [{3}, {1}] * 2
    assert {request.task for request in rig.rewards.requests} == {"test", "plain"}
