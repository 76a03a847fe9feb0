"""A whole asynchronous run, its recorder and then all of it killed, replayed from its log to the bit and the token.

Minutes, so `make chaos` runs it and `make test` does not.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import psutil
import pytest

from cluster.journal.files import read_log
from cluster.journal.history import History
from tests.runs.test_commands import metrics, started_by, wait_for
from tests.support.paths import LETTERS, ROOT
from tests.support.processes import name_of

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(1200)]

NUM_STEPS, B, LAG = 55, 8, 2
SETTINGS = (
    f"trajectory_queue.max_policy_lag = {LAG}",
    f"learner.num_steps = {NUM_STEPS}",
    "rollout_actors.num_actors = 2",
    "evaluation.every_steps = 100",
)


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "deploy.cli", *arguments]
    environment, pipe = os.environ | {"PYTHONPATH": str(ROOT)}, subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def train(runs: Path) -> subprocess.Popen[str]:
    lines = [part for line in SETTINGS for part in ("--set", line)]
    return start("train", LETTERS, "--runs-dir", str(runs), *lines)


def output_of(process: subprocess.Popen[str]) -> str:
    """What a command that ends well printed."""
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return output


def recorder_of(process: subprocess.Popen[str]) -> psutil.Process:
    (recorder,) = (child for child in started_by(process) if name_of(child).startswith("ray::Recorder"))
    return recorder


def kill_all(process: subprocess.Popen[str]) -> None:
    """The end of a machine: the command and all it started, with no word to any of them."""
    children = started_by(process)
    process.kill()
    for victim in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    process.communicate()
    psutil.wait_procs(children, timeout=30)


def test_asynchronous_run_replays_exactly_if_it_was_killed_and_resumed(tmp_path: Path) -> None:
    run = tmp_path / "letters"
    killed = train(tmp_path)
    try:
        wait_for(lambda: len(metrics(run)) >= 4, killed, timeout_s=500)
        recorder_of(killed).kill()
        wait_for(lambda: len(metrics(run)) >= 12, killed)
    finally:
        kill_all(killed)
    second = train(tmp_path)
    _, said = second.communicate(timeout=600)
    assert second.returncode == 0, said
    assert "ppo: goes on from " in said

    kinds = read_log(run / "records", ["kind"])["kind"].to_pylist()
    assert kinds.count("ADMIT") == B * NUM_STEPS, "a prompt was admitted twice"
    history = History(run / "records")
    assert history.steps == list(range(1, NUM_STEPS + 1))
    assert astuple(history.counts()) == (B * NUM_STEPS, B * NUM_STEPS, 0, 0)
    trained = [t for step in history.steps for group in history.groups(step) for t in group]
    assert len({t.uid for t in trained}) == len(trained)
    assert max((t.step or 0) - 1 - segment.policy_version for t in trained for segment in t.segments) == LAG
    assert max(len(t.segments) for t in trained) > 1, "no swap cut a response"
    assert len(metrics(run)) == json.loads((run / "status.json").read_text())["step"] == NUM_STEPS

    output = output_of(start("replay", str(run), "--tokens"))
    num = NUM_STEPS + 1
    assert f"versions 0 to {NUM_STEPS}: {num} of {num} have the recorded checksums" in output
    assert "sampled again: 100.00% token-identical" in output
