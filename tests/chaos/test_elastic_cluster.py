"""A run on a Ray whose nodes come and go: rollout actors join on the new ones, and what a lost one held is done again.

Minutes, so `make chaos` runs it and `make test` does not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from cluster.journal.history import History
from tests.runs.test_commands import metrics, wait_for
from tests.support.paths import LETTERS, ROOT

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(1200)]

NUM_STEPS, B = 400, 8
SETTINGS = (
    "trajectory_queue.max_policy_lag = 0",
    f"learner.num_steps = {NUM_STEPS}",
    "rollout_actors.num_actors = 1",
    "rollout_actors.max_actors = 2",
    "rollout_actors.num_cpus = 2",
    "evaluation.every_steps = 1000",
)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head node with room for one rollout actor beside the learner and the reward service."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def train(cluster: Cluster, runs: Path) -> subprocess.Popen[str]:
    settings = [part for line in SETTINGS for part in ("--set", line)]
    command = [sys.executable, "-m", "deploy.cli", "train", LETTERS, "--runs-dir", str(runs), *settings]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": cluster.address}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def num_actors(run: Path) -> int:
    return int(metrics(run)[-1]["rollout_actors/num_actors"]) if metrics(run) else 0


def test_run_uses_a_node_that_joins_and_continues_if_it_is_lost(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "letters"
    process = train(cluster, tmp_path)
    try:
        wait_for(lambda: len(metrics(run)) >= 8, process, timeout_s=400)
        assert num_actors(run) == 1
        node = cluster.add_node(num_cpus=2)
        wait_for(lambda: num_actors(run) == 2, process)
        joined_at = len(metrics(run))
        wait_for(lambda: len(metrics(run)) >= joined_at + 10, process)
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=2)
        _, errors = process.communicate(timeout=400)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, errors
    assert "the learner waited for groups; 2 rollout actors" in errors
    assert "rollout-1 failed" in errors
    assert json.loads((run / "status.json").read_text())["step"] == NUM_STEPS
    history = History(run / "records")
    assert astuple(history.counts()) == (B * NUM_STEPS, B * NUM_STEPS, 0, 0)
    trained = [t for step in history.steps for group in history.groups(step) for t in group]
    assert len({t.uid for t in trained}) == len(trained)
    assert {s.actor for t in trained for s in t.segments} >= {"rollout-0", "rollout-1"}
