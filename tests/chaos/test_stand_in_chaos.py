"""Rapid deaths in a ring of stand-ins: real Ray actors around engines that need no start-up, killed every few seconds.

Minutes, so `make chaos` runs it and `make test` does not.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks.scale.ring import Plan, StandInRing, stand_in_ring
from benchmarks.scale.stand_ins import LogNormalLengths, Pace
from cluster.journal.files import read_log
from cluster.journal.history import History
from cluster.ledger import QueueCounts
from cluster.trajectory import Trajectory
from tests.support.processes import name_of

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(900)]

KILL_EVERY_S, NUM_KILLS = 5.0, 20
RAPID = Plan(
    num_actors=6,
    num_steps=165,
    num_concurrent_groups=6,
    max_restarts=1000,
    pace=Pace(step_s=0.016, lengths=LogNormalLengths(30)),
    max_response_tokens=120,
)


@dataclass
class Turned:
    """A run that is over: how long it turned, its ledger as the queue has it, and its log."""

    wall_s: float
    counts: QueueCounts
    folder: Path
    kills: list[str] = field(default_factory=list)

    def trained(self) -> list[Trajectory]:
        history = History(self.folder)
        return [t for step in history.steps for group in history.groups(step) for t in group]

    def require_exact(self, plan: Plan) -> None:
        """The ledger counted from the log: every group that a step needs was trained, once, and none is open."""
        assert History(self.folder).counts() == self.counts
        kinds = read_log(self.folder, ("kind",))["kind"].to_pylist()
        num = plan.num_steps * plan.groups_per_step
        assert (self.counts.num_trained, self.counts.num_open) == (num, 0)
        assert kinds.count("ADMIT") == self.counts.num_admitted == num + self.counts.num_void
        assert kinds.count("VOID") == self.counts.num_void
        trained = self.trained()
        assert len({t.uid for t in trained}) == len(trained) == num * plan.responses_per_prompt
        assert [t.admission_index for t in trained] == [i // plan.responses_per_prompt for i in range(len(trained))]


async def turn(plan: Plan, folder: Path, *, seed: int | None = None) -> Turned:
    """A run of that plan; with a `seed`, one of its actors or its recorder is killed every KILL_EVERY_S seconds."""
    kills: list[str] = []
    async with stand_in_ring(plan, folder) as ring:
        killing = asyncio.create_task(kill_at_random(ring, seed, kills)) if seed is not None else None
        started = time.monotonic()
        counts = await ring.turn()
        wall_s = time.monotonic() - started
        if killing is not None:
            killing.cancel()
            await asyncio.gather(killing, return_exceptions=True)
    return Turned(wall_s, counts, folder, kills)


async def kill_at_random(ring: StandInRing, seed: int, kills: list[str]) -> None:
    draw = random.Random(f"kills:{seed}")
    while True:
        await asyncio.sleep(KILL_EVERY_S)
        pids = {actor.name: int(await actor.pid()) for actor in ring.pool.actors} | {"recorder": recorder_pid()}
        victim = draw.choice(sorted(pids))
        os.kill(pids[victim], signal.SIGKILL)
        kills.append(victim)


def recorder_pid() -> int:
    """The process of the recorder: the one that is there, if Ray starts another at this moment."""
    children = psutil.Process().children(recursive=True)
    return max(child.pid for child in children if name_of(child).startswith("ray::Recorder"))


@pytest.fixture(scope="module")
def calm(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Turned:
    """The run that nothing happens to."""
    return asyncio.run(turn(RAPID, tmp_path_factory.mktemp("calm")))


@pytest.mark.parametrize("seed", [0, 1, 2])
async def test_ledger_is_exact_in_at_most_1_5_times_the_time_with_frequent_kills(
    calm: Turned, tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = await turn(RAPID, tmp_path, seed=seed)
    ratio = killed.wall_s / calm.wall_s
    with capsys.disabled():
        print(
            f"\nseed {seed}: {len(killed.kills)} kills, {killed.kills.count('recorder')} of the recorder; {ratio:.2f}x"
        )
        print(f"  without {calm.wall_s:.0f} s, {calm.counts}\n  with {killed.wall_s:.0f} s, {killed.counts}")
    calm.require_exact(RAPID)
    killed.require_exact(RAPID)
    assert len(killed.kills) >= NUM_KILLS
    assert ratio <= 1.5


async def test_new_trajectory_arrives_within_60_s_if_all_actors_die_at_once(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    died_at = 0.0

    async def kill_all_once(step: int) -> None:
        nonlocal died_at
        if step == 10:
            pids = await asyncio.gather(*(actor.pid() for actor in ring.pool.actors))
            died_at = time.time()
            for pid in pids:
                os.kill(pid, signal.SIGKILL)

    plan = replace(RAPID, num_steps=20)
    async with stand_in_ring(plan, tmp_path) as ring:
        counts = await ring.turn(kill_all_once)
    Turned(0.0, counts, tmp_path).require_exact(plan)
    new = {t.uid for t in Turned(0.0, counts, tmp_path).trained() if any("+" in s.actor for s in t.segments)}
    log = read_log(tmp_path, ("kind", "uid", "time_s")).to_pylist()
    first_s = min(row["time_s"] for row in log if row["kind"] == "SCORE" and row["uid"] in new) - died_at
    with capsys.disabled():
        print(f"\nall {plan.num_actors} actors killed: first new trajectory after {first_s:.1f} s")
    assert 0 < first_s <= 60


TAILED = Plan(
    num_actors=4,
    num_steps=100,
    groups_per_step=100,
    num_concurrent_groups=32,
    max_response_tokens=800,
    pace=Pace(step_s=0.001, lengths=LogNormalLengths(20)),
)
"""Lengths whose 99th percentile is ten times the median."""


async def test_lag_2_trains_the_same_distribution_of_lengths_as_lag_0(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths: dict[int, list[int]] = {}
    for lag in (0, 2):
        run = await turn(replace(TAILED, max_policy_lag=lag), tmp_path / str(lag))
        run.require_exact(TAILED)
        trained = run.trained()
        assert largest_lag(trained) == lag
        lengths[lag] = [t.num_response_tokens for t in trained if (t.step or 0) <= TAILED.num_steps // 2]
    assert sum(len(t.segments) > 1 for t in trained) > 100, "hardly a response was cut by a swap"
    statistic = kolmogorov_smirnov(lengths[0], lengths[2])
    with capsys.disabled():
        print(f"\nlengths at lag 2 against lag 0: {statistic:.4f}, n = {len(lengths[2]):,}")
    assert len(lengths[0]) == len(lengths[2]) >= 5_000
    assert np.percentile(lengths[0], 99) >= 8 * np.median(lengths[0])
    assert statistic <= 0.05


def largest_lag(trajectories: list[Trajectory]) -> int:
    return max((t.step or 0) - 1 - segment.policy_version for t in trajectories for segment in t.segments)


def kolmogorov_smirnov(first: list[int], second: list[int]) -> float:
    """The largest gap between the two samples' cumulative distributions."""
    values = np.union1d(first, second)
    shares = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (first, second)]
    return float(np.abs(shares[0] - shares[1]).max())
