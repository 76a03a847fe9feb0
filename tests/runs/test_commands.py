"""Whole commands as a person types them: interrupted, resumed, and what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.files import sha256_of_files
from tests.support.paths import LETTERS, ROOT
from tests.support.processes import children_of, command_of, name_of, running

NUM_STEPS = 24
pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


def command(runs: Path, *lines: str) -> list[str]:
    settings = [part for line in lines for part in ("--set", line)]
    return [sys.executable, "-m", "deploy.cli", "train", LETTERS, "--runs-dir", str(runs), *settings]


def metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["stage"] == "ppo"]


def of_this_user() -> set[int]:
    return set(running())


def wait_for(condition: Any, process: subprocess.Popen[str], timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)


def started_by(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return children_of(process)


def actors_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [child for child in started_by(process) if name_of(child).startswith("ray::RolloutAct")]


def names_of(pids: set[int]) -> set[str]:
    return {name_of(process) for pid, process in running().items() if pid in pids}


@pytest.mark.chaos
def test_a_command_names_a_rollout_actor_killed_during_its_start(tmp_path: Path) -> None:
    before = of_this_user()
    line = command(tmp_path, "rollout_actors.max_restarts = 0")
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    wait_for(lambda: actors_of(process), process)
    started = {process.pid, *(child.pid for child in started_by(process))}
    actors_of(process)[0].kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert errors.strip().splitlines()[-1].startswith("error: rollout-0: "), errors
    assert "rollout-0" in json.loads((tmp_path / "letters" / "status.json").read_text())["error"]
    assert not started & (of_this_user() - before)
    assert not {"raylet", "gcs_server"} & names_of(of_this_user() - before), "another Ray was started"


def failed(tmp_path: Path, *lines: str) -> tuple[int, str]:
    """Run a command that fails; returns its exit code and last line. It leaves no trajectory and no process."""
    env = os.environ | {"STARTED_BY": str(tmp_path)}
    done = subprocess.run(command(tmp_path, *lines), cwd=ROOT, capture_output=True, text=True, timeout=240, env=env)
    last = done.stderr.strip().splitlines()[-1]
    status = json.loads((tmp_path / "letters" / "status.json").read_text())
    assert (status["state"], f"error: {status['error']}") == ("FAILED", last)
    assert not list(tmp_path.rglob("*.arrow"))
    assert not {"raylet", "gcs_server"} & names_started_by(tmp_path)
    return done.returncode, last


def names_started_by(path: Path) -> set[str]:
    """Return the names of the processes whose environment has STARTED_BY set to `path`."""
    names = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("STARTED_BY") == str(path):
                names.add(process.name())
    return names


def test_a_taken_port_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, last = failed(tmp_path, f"reward_service.port = {port}")
    assert (code, last) == (2, f"error: reward_service.port: {port} is taken on 127.0.0.1")


@pytest.mark.chaos
def test_a_scorer_that_raises_is_named_before_an_engine_is_loaded(tmp_path: Path) -> None:
    code, last = failed(tmp_path, "reward_service.scorer = 'tests.support.scorers:raising'")
    assert code == 2
    assert re.match(
        r"error: tests/support/scorers.py:\d+: tests.support.scorers:raising raised KeyError: 'no such answer'", last
    )
    assert not list((tmp_path / "letters" / "logs").glob("rollout*"))


@pytest.mark.chaos
def test_a_command_names_a_scorer_that_raises_during_training(tmp_path: Path) -> None:
    code, last = failed(tmp_path, "reward_service.scorer = 'tests.support.scorers:raising_on_text'")
    assert code == 1
    assert "tests.support.scorers:raising_on_text: raised KeyError: 'no such answer' at tests/support/" in last


def interrupt(process: subprocess.Popen[str], number: signal.Signals, before: set[int]) -> None:
    """Signal the whole process group, as a terminal does, and check exit code, last line and processes."""
    started = {process.pid, *(child.pid for child in started_by(process))}
    assert len(started) > 5
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 130, errors
    assert "never retrieved" not in errors, errors
    assert errors.strip().splitlines()[-1].startswith("interrupted; the same command resumes")
    left = {pid: process for pid, process in running().items() if pid in started - before}
    assert not left, [command_of(process) for process in left.values()]


def begin(runs: Path) -> subprocess.Popen[str]:
    """Start the command in its own process group, as a terminal does."""
    env, pipe = os.environ | {"COLUMNS": "100"}, subprocess.PIPE
    line = command(runs)
    return subprocess.Popen(line, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


@pytest.mark.slow
def test_an_interrupted_run_leaves_no_process_and_is_resumed(tmp_path: Path) -> None:
    run, before = tmp_path / "letters", of_this_user()
    env = os.environ | {"COLUMNS": "100"}
    first = begin(tmp_path)
    wait_for(lambda: (run / "checkpoints" / "ppo" / "step-000005").exists(), first)
    interrupt(first, signal.SIGINT, before)
    assert json.loads((run / "status.json").read_text())["state"] == "INTERRUPTED"
    done = subprocess.run(command(tmp_path), cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    _is_whole(run)
    again = subprocess.run(command(tmp_path), cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0
    assert "already done" in again.stderr
    changed = command(tmp_path, "learner.clip = 0.1")
    refused = subprocess.run(changed, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert "learner.clip" in refused.stderr.strip().splitlines()[-1]


@pytest.mark.chaos
def test_a_run_interrupted_during_its_start_leaves_no_process(tmp_path: Path) -> None:
    before = of_this_user()
    process = begin(tmp_path)
    wait_for(lambda: actors_of(process), process)
    interrupt(process, signal.SIGTERM, before)
    assert json.loads((tmp_path / "letters" / "status.json").read_text())["state"] == "INTERRUPTED"


def _is_whole(run: Path) -> None:
    """Check that every step is there once, the ledger adds up, and `policy/` loads as a Hugging Face folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    steps = metrics(run)
    assert [row["step"] for row in steps] == list(range(1, NUM_STEPS + 1))
    assert [row["num_episodes"] for row in steps] == [16 * step for step in range(1, NUM_STEPS + 1)]
    summary = json.loads((run / "summary.json").read_text())
    counts = [summary[f"num_{name}"] for name in ("admitted", "trained", "void", "open")]
    assert counts == [8 * NUM_STEPS, 8 * NUM_STEPS, 0, 0]
    assert steps[-1]["rollout_actors/num_swaps_proved"] + steps[-1]["rollout_actors/num_swaps_checksum_only"] > 0
    assert len(list((run / "trajectories").iterdir())) == NUM_STEPS
    assert summary["policy_sha256"] == sha256_of_files([run / "policy" / "model.safetensors"])
    AutoModelForCausalLM.from_pretrained(run / "policy")
    assert AutoTokenizer.from_pretrained(run / "policy")("bcd:").input_ids
