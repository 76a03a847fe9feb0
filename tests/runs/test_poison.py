"""A prompt that kills every actor that samples it, among real Ray actors: its group is voided, the run continues."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.scale.ring import ROWS, Plan, stand_in_ring
from benchmarks.scale.stand_ins import Pace
from cluster.data.prompt_order import PromptOrder
from cluster.journal.history import History
from cluster.ledger import QueueCounts

POISONED = 5


@pytest.mark.ray
@pytest.mark.timeout(120)
@pytest.mark.parametrize("lag", [0, 2])
async def test_only_the_prompt_that_kills_its_actors_is_voided(ray_session: None, tmp_path: Path, lag: int) -> None:
    deadly = PromptOrder(ROWS, 0).row(POISONED)["prompt"]
    pace = Pace(step_s=0.001, deadly_prompt=deadly)
    plan = Plan(num_actors=2, num_steps=4, groups_per_step=4, max_policy_lag=lag, max_restarts=9, pace=pace)
    async with stand_in_ring(plan, tmp_path) as ring:
        counts = await ring.turn()
        ((uid, reason),) = await ring.queue.voided()
    assert uid == f"0-{POISONED}-0"
    assert reason.startswith("its prompt was under way at the death of rollout-")
    assert 2 <= len(reason.split(", ")) <= 4
    assert counts == History(tmp_path).counts() == QueueCounts(num_admitted=17, num_trained=16, num_void=1, num_open=0)
    trained = [group[0].group for step in History(tmp_path).steps for group in History(tmp_path).groups(step)]
    assert sorted(trained) == [number for number in range(17) if number != POISONED]
    assert [group[0].admission_index for step in (1, 2, 3, 4) for group in History(tmp_path).groups(step)] == list(
        range(16)
    )
