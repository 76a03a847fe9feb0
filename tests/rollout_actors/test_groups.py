"""Test that responses kept from an earlier command stay behind their own prompt."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import TrajectoryQueueConfig
from cluster.data.prompt_order import TaskPrompts
from cluster.errors import InputError
from cluster.ledger import PendingGroup, ResumePoint
from cluster.queue.trajectory_queue import TrajectoryQueue
from cluster.trajectory import PartialResponse, Segment
from rollout_actors import groups
from tests.support.actor_rig import Rig

KEPT_PROMPT, ROW_PROMPT = [5, 6, 20], [5, 6, 7]


def rig_with_a_kept_response(folder: Path, *, row: str) -> Rig:
    """A run that resumes with the first token of a response to KEPT_PROMPT."""
    rig = Rig(folder, num_steps=1, groups=1)
    kept = PartialResponse("3-0-0", [9], [-0.5], [Segment(0, 0, 1, 1, "rollout-0")], None, [KEPT_PROMPT])
    rig.queue = TrajectoryQueue(
        TrajectoryQueueConfig(groups_per_step=1, take_timeout_s=20),
        [TaskPrompts("test", [{"prompt": row}])],
        run_seed=3,
        num_steps=1,
        standing=ResumePoint(next_group=1, next_index=1, open=(PendingGroup(0, 0, (kept,)),)),
    )
    return rig


async def prompts_of_the_group(rig: Rig) -> list[list[int]]:
    async with rig.actor() as actor:
        running = rig.run(actor)
        await rig.publish(0)
        (group,) = await rig.queue.take(1)
        await actor.stop()
        await running
    return [trajectory.token_ids[:3] for trajectory in group]


async def test_a_kept_response_continues_behind_its_prompt(tied_folder: Path) -> None:
    rig = rig_with_a_kept_response(tied_folder, row="t5 t6 t20")
    assert await prompts_of_the_group(rig) == [KEPT_PROMPT, KEPT_PROMPT]


async def test_a_kept_response_of_another_prompt_is_an_error(tied_folder: Path) -> None:
    rig = rig_with_a_kept_response(tied_folder, row="t5 t6 t7")
    async with rig.actor() as actor:
        running = rig.run(actor)
        await rig.publish(0)
        with pytest.raises(InputError, match=r"data\.prompts: group 0 has responses to a prompt of 3 tokens"):
            await running


async def test_a_group_begun_on_another_day_keeps_its_prompt(
    tied_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "differ_by_date", lambda tokenizer, own, kept: (own, kept) == (ROW_PROMPT, KEPT_PROMPT))
    rig = rig_with_a_kept_response(tied_folder, row="t5 t6 t7")
    assert await prompts_of_the_group(rig) == [KEPT_PROMPT, KEPT_PROMPT]
