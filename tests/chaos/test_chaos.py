"""Whole commands whose parts are killed as they run: they end well, with the weights of one that nothing happened to.

Minutes each, so `make chaos` runs them and `make test` does not.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.runs.test_commands import metrics, of_this_user, started_by, wait_for
from tests.support.paths import ROOT
from tests.support.processes import open_paths

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(1200)]

NUM_STEPS = 12
SETTINGS = (
    "learner.num_learners = 2",
    "trajectory_queue.max_policy_lag = 0",
    f"learner.num_steps = {NUM_STEPS}",
    "learner.checkpoint_every_steps = 5",
)


def start(runs: Path, name: str) -> subprocess.Popen[str]:
    settings = [part for line in SETTINGS for part in ("--set", line)]
    command = [sys.executable, "-m", "deploy.cli", "train", "examples/letters/run.toml", "--runs-dir", str(runs)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*command, "--name", name, *settings], cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True
    )


def end_of(process: subprocess.Popen[str]) -> str:
    """What a command that ends well said on stderr."""
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return errors


def learner(process: subprocess.Popen[str], run: Path, rank: int) -> psutil.Process:
    """The process of a rank: the one that prints into its log."""
    log = str(run / "logs" / f"learner-{rank}.log")
    (found,) = (child for child in started_by(process) if log in open_paths(child))
    return found


def policy_sha256(run: Path) -> str:
    return hashlib.sha256(
        b"".join(file.read_bytes() for file in sorted((run / "policy").glob("*.safetensors")))
    ).hexdigest()


def test_run_differs_only_in_its_time_if_a_learner_is_killed(tmp_path: Path) -> None:
    before = of_this_user()
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    end_of(start(tmp_path, "calm"))
    process = start(tmp_path, "killed")
    wait_for(lambda: len(metrics(killed)) >= 7, process, timeout_s=400)
    started = {child.pid for child in started_by(process)}
    learner(process, killed, 1).kill()
    errors = end_of(process)

    assert "learner-1: its process died; rebuilt from checkpoint step 5, " in errors
    assert "differs" not in errors
    assert [row["step"] for row in metrics(killed)] == list(range(1, NUM_STEPS + 1))
    assert metrics(killed)[-1]["learner/num_learner_restarts"] == 1
    summary = json.loads((killed / "summary.json").read_text())
    counts = [summary[f"num_{name}"] for name in ("admitted", "trained", "void", "open")]
    assert counts == [64 * NUM_STEPS, 64 * NUM_STEPS, 0, 0]
    assert summary["num_learner_restarts"] == 1
    assert policy_sha256(killed) == policy_sha256(calm) == summary["policy_sha256"]
    assert not started & (of_this_user() - before)
