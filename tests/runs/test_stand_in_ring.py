"""The ring of stand-ins that benchmarks and chaos tests build on does what a ring does."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles

import pytest

from benchmarks.scale.ring import Plan, stand_in_ring
from benchmarks.scale.stand_ins import LogNormalLengths, Pace
from cluster.journal.history import History
from cluster.ledger import QueueCounts


@pytest.mark.ray
async def test_a_ring_of_stand_ins_trains_every_group_once_and_in_order(ray_session: None, tmp_path: Path) -> None:
    plan = Plan(num_actors=2, num_steps=6, groups_per_step=4, pace=Pace(step_s=0.001))
    async with stand_in_ring(plan, tmp_path) as ring:
        counts = await ring.turn()
    history = History(tmp_path)
    assert counts == history.counts() == QueueCounts(num_admitted=24, num_trained=24, num_void=0, num_open=0)
    assert [group[0].group for step in history.steps for group in history.groups(step)] == list(range(24))
    assert history.versions == list(range(7))


def test_length_distribution_is_the_same_if_responses_are_interrupted() -> None:
    lengths, draw = LogNormalLengths(median_tokens=40), random.Random(0)
    whole = [lengths.left(0, draw.getrandbits(60)) for _ in range(4000)]
    cut = [lengths.left(0, draw.getrandbits(60)) for _ in range(4000)]
    cut = [length if length <= 30 else 30 + lengths.left(30, draw.getrandbits(60)) for length in cut]
    for sample in (whole, cut):
        assert median(sample) == pytest.approx(40, rel=0.1)
        assert quantiles(sample, n=100)[-1] == pytest.approx(400, rel=0.25)


@pytest.mark.ray
async def test_groups_of_equal_rewards_are_resampled_and_accounted(ray_session: None, tmp_path: Path) -> None:
    plan = Plan(num_actors=2, num_steps=3, groups_per_step=4, max_policy_lag=1, responses_per_prompt=2, max_resamples=2)
    async with stand_in_ring(replace(plan, pace=Pace(step_s=0.001)), tmp_path) as ring:
        counts = await ring.turn()
        assert await ring.queue.voided() == []
    history = History(tmp_path)
    assert counts == history.counts() == QueueCounts(36, 12, 24, 0, num_resampled=24)
    steps = [history.groups(step) for step in history.steps]
    assert [group[0].admission_index for groups in steps for group in groups] == list(range(12))
    oldest = [min(s.policy_version for group in groups for t in group for s in t.segments) for groups in steps]
    assert all(version >= step - 1 for step, version in enumerate(oldest)), "the lag bound holds"
