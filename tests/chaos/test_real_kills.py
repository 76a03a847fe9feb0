"""Rollout actors with real engines, each killed when it is at work again; beside it runs that nothing happens to.

Many minutes, for `make chaos`.
"""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import pyarrow.compute as pc
import pytest

from cluster.journal.files import read_log
from cluster.journal.history import History
from tests.chaos.test_whole_replay import start
from tests.runs.test_commands import actors_of, metrics
from tests.support.paths import LETTERS
from tests.support.processes import is_running

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(3000)]

SEEDS = (0, 1, 2)
NUM_STEPS, B, NUM_KILLS, STEPS_BETWEEN = 150, 8, 10, 2
LOOK_EVERY_S = 0.5
SPREAD = 0.05
"""Two standard deviations of the last tenth's reward of nine runs that nothing happened to (0.892 to 0.973)."""


def train(runs: Path, name: str, seed: int) -> subprocess.Popen[str]:
    lines = (
        f"run.seed = {seed}",
        f"learner.num_steps = {NUM_STEPS}",
        "rollout_actors.max_restarts = 100",
        "evaluation.every_steps = 1000",
    )
    settings = [part for line in lines for part in ("--set", line)]
    return start("train", LETTERS, "--runs-dir", str(runs), "--name", name, *settings)


def has_delivered(run: Path, generation: int) -> bool:
    """Whether the only rollout actor has as this generation."""
    latest = pc.max(read_log(run / "records", ["generation"])["generation"]).as_py()
    return latest is not None and latest >= generation


def kill_actor(process: subprocess.Popen[str]) -> None:
    *_, actor = (child for child in actors_of(process) if is_running(child))
    actor.kill()


def kill_again_and_again(process: subprocess.Popen[str], run: Path) -> list[tuple[float, float]]:
    """Kill every actor that is at work and has seen a few steps.

    Returns when each died and when the next had delivered and a step was done with that.
    """
    recoveries: list[tuple[float, float]] = []
    died_at, steps_before, num_killed, delivered_by = 0.0, 0, 0, 0
    while process.poll() is None and (num_steps := len(metrics(run))) < NUM_STEPS - 1:
        time.sleep(LOOK_EVERY_S)
        if died_at and delivered_by < num_killed:
            if has_delivered(run, num_killed):
                delivered_by, steps_before = num_killed, num_steps
        elif died_at and num_steps > steps_before:
            recoveries.append((died_at, time.monotonic()))
            died_at, steps_before = 0.0, num_steps
        elif not died_at and num_steps >= steps_before + STEPS_BETWEEN and num_killed < NUM_KILLS + 2:
            kill_actor(process)
            num_killed += 1
            died_at = time.monotonic()
    return recoveries


def reward_of(run: Path) -> float:
    """Mean of the last tenth of the steps."""
    last = metrics(run)[-NUM_STEPS // 10 :]
    return fmean(row["learner/reward_mean"] for row in last)


@dataclass
class Done:
    """A run that is over."""

    wall_s: float
    reward: float
    num_void: int


def finished(process: subprocess.Popen[str], run: Path, started: float) -> Done:
    """The run, whose ledger is exact: every group trained once or void, and none with an older token than allowed."""
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    wall_s, history = time.monotonic() - started, History(run / "records")
    counts = history.counts()
    assert (counts.num_admitted, counts.num_trained) == (B * NUM_STEPS + counts.num_void, B * NUM_STEPS)
    assert counts.num_open == 0
    uids = [t.uid for step in history.steps for group in history.groups(step) for t in group]
    assert len(uids) == len(set(uids))
    assert json.loads((run / "summary.json").read_text())["policy_lag_max"] <= 1
    return Done(wall_s, reward_of(run), counts.num_void)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> list[Done]:
    """The runs of every seed that nothing happens to."""
    runs = tmp_path_factory.mktemp("calm")
    return [finished(train(runs, str(seed), seed), runs / str(seed), time.monotonic()) for seed in SEEDS]


@pytest.mark.parametrize("seed", SEEDS)
def test_ledger_is_exact_and_reward_unchanged_after_ten_engine_kills(
    calm: list[Done], tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    process = train(tmp_path, "killed", seed)
    recoveries = kill_again_and_again(process, tmp_path / "killed")
    killed = finished(process, tmp_path / "killed", started)
    recovered_s = sum(back - died for died, back in recoveries)
    with capsys.disabled():
        print(f"\nseed {seed}: {len(recoveries)} kills, {recovered_s:.0f} s of recoveries\n  {killed}\n  calm: {calm}")
    assert len(recoveries) >= NUM_KILLS
    assert killed.wall_s <= 1.1 * calm[seed].wall_s + recovered_s
    assert abs(killed.reward - fmean(done.reward for done in calm)) <= SPREAD
