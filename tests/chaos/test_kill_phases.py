"""Each part of a run killed in each of its phases: the run ends with the weights of one that nothing happened to.

Where a part that the command does not replace was killed the same command is given again. Minutes, for `make chaos`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.journal.history import History
from tests.chaos.test_chaos import policy_sha256
from tests.runs.test_commands import metrics
from tests.support.paths import LETTERS, ROOT

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(600)]

NUM_STEPS, B = 6, 8
SETTINGS = (
    "learner.num_learners = 1",
    "trajectory_queue.max_policy_lag = 0",
    f"learner.num_steps = {NUM_STEPS}",
    "learner.checkpoint_every_steps = 3",
    "evaluation.every_steps = 100",
)
HEALED = {
    "learner, forward": "learner.model.actor_critic:ActorCritic.forward:9:before",
    "learner, backward": "torch._tensor:Tensor.backward:8:before",
    "learner, optimiser": "learner.distributed.gradients:clip_gradients:8:before",
    "learner, checkpoint half written": "learner.checkpoint:write_index:1:before",
    "learner, checkpoint renamed": "learner.ppo.rank:PPORank.save_checkpoint:1:after",
    "learner, publication": "learner.ppo.weights:WeightPublisher.publish:4:before",
    "recorder, before a write": "cluster.journal.files:LogFile.append:12:before",
    "recorder, after a write": "cluster.journal.files:LogFile.append:12:after",
    "rollout actor, fetching weights": "rollout_actors.engine.loading:fetch_published:3:before",
    "rollout actor, delivering": "rollout_actors.delivery:Deliveries._deliver:4:before",
}
GIVEN_AGAIN = {
    "driver, before training": "learner.ppo.group:PPOLearnerGroup.step:5:before",
    "driver, trained and not recorded": "learner.ppo.group:PPOLearnerGroup.step:5:after",
    "driver, publication": "deploy.ring.calls:RingCalls.publish:5:before",
    "driver, published": "deploy.ring.calls:RingCalls.publish:5:after",
    "driver, checkpoint": "deploy.ring.checkpoints:Checkpoints.write:1:before",
    "driver, after a checkpoint": "deploy.ring.checkpoints:Checkpoints.write:1:after",
    "queue": "cluster.queue.trajectory_queue:TrajectoryQueue.take:4:before",
    "weight store": "cluster.weights.manifest:WeightStore.publish:4:after",
}


def run(runs: Path, name: str, kill_at: str = "") -> subprocess.CompletedProcess[str]:
    settings = [part for line in SETTINGS for part in ("--set", line)]
    command = [
        sys.executable,
        "-m",
        "deploy.cli",
        "train",
        LETTERS,
        "--runs-dir",
        str(runs),
        "--name",
        name,
    ]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support' / 'kill_at'}"}
    if kill_at:
        environment |= {"KILL_AT": kill_at, "KILL_FLAG": str(runs / f"{name}.killed")}
    return subprocess.run(
        [*command, *settings], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False
    )


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of a run that nothing happens to."""
    runs = tmp_path_factory.mktemp("calm")
    done = run(runs, "calm")
    assert done.returncode == 0, done.stderr
    return policy_sha256(runs / "calm")


def require_as_calm(run: Path, calm: str) -> None:
    history = History(run / "records")
    counts = history.counts()
    assert (counts.num_admitted, counts.num_trained, counts.num_void, counts.num_open) == (B * NUM_STEPS,) * 2 + (0, 0)
    uids = [t.uid for step in history.steps for group in history.groups(step) for t in group]
    assert len(uids) == len(set(uids))
    assert [row["step"] for row in metrics(run)] == list(range(1, NUM_STEPS + 1))
    assert not list((run / "checkpoints" / "ppo").glob(".*"))
    assert json.loads((run / "status.json").read_text())["state"] == "DONE"
    assert policy_sha256(run) == calm


@pytest.mark.parametrize("phase", HEALED)
def test_a_run_has_the_same_weights_after_a_part_is_replaced(tmp_path: Path, calm: str, phase: str) -> None:
    done = run(tmp_path, "killed", HEALED[phase])
    assert (tmp_path / "killed.killed").exists(), "nobody came there"
    assert done.returncode == 0, done.stderr
    require_as_calm(tmp_path / "killed", calm)


@pytest.mark.parametrize("phase", GIVEN_AGAIN)
def test_a_repeated_command_ends_with_the_same_weights(tmp_path: Path, calm: str, phase: str) -> None:
    killed = run(tmp_path, "killed", GIVEN_AGAIN[phase])
    assert (tmp_path / "killed.killed").exists(), "nobody came there"
    assert killed.returncode != 0
    again = run(tmp_path, "killed", GIVEN_AGAIN[phase])
    assert again.returncode == 0, again.stderr
    assert "ppo: goes on from " in again.stderr
    require_as_calm(tmp_path / "killed", calm)
