"""Two runs of the same name on one Ray: each has its own actors, service and rewards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from cluster.journal.history import History
from tests.support.paths import LETTERS, ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

NUM_STEPS = 3
SETTINGS = (f"learner.num_steps = {NUM_STEPS}", "evaluation.every_steps = 1000", "rollout_actors.num_cpus = 1")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def train(cluster: Cluster, runs: Path, scorer: str) -> subprocess.Popen[str]:
    lines = (*SETTINGS, f'reward_service.scorer = "{scorer}"')
    settings = [part for line in lines for part in ("--set", line)]
    command = [sys.executable, "-m", "deploy.cli", "train", LETTERS, "--runs-dir", str(runs), *settings]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": cluster.address}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def scorers_of(run: Path) -> set[str]:
    """Return the names of the scorers that gave the rewards of a run's trained trajectories."""
    history = History(run / "records")
    assert history.steps == list(range(1, NUM_STEPS + 1))
    trained = [t for step in history.steps for group in history.groups(step) for t in group]
    return {trajectory.scorer_version.partition("@")[0] for trajectory in trained}


def test_runs_of_one_name_on_one_ray_keep_their_rewards(cluster: Cluster, tmp_path: Path) -> None:
    scorers = {"first": "examples.letters.scorers:count_a", "second": "tests.support.scorers:length"}
    processes = {folder: train(cluster, tmp_path / folder, scorer) for folder, scorer in scorers.items()}
    try:
        for folder, process in processes.items():
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
            assert json.loads((tmp_path / folder / "letters" / "status.json").read_text())["state"] == "DONE"
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()
    for folder, scorer in scorers.items():
        assert scorers_of(tmp_path / folder / "letters") == {scorer}
