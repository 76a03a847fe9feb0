"""Test runs whose reward service fails: they pause, print why, continue, and train only on valid rewards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.trajectory import read_trajectories
from examples.letters.scorers import count_a
from tests.runs.test_commands import metrics, wait_for
from tests.support.paths import ROOT

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(900)]
NUM_STEPS, DOWN_S, EACH_S = 30, 60.0, 6.0
FAILURES = ("500", "429", "nan", "short", "types", "nonsense", "silent")


class FailingService(ThreadingHTTPServer):
    """Answers POST /v1/rewards, or fails as `mode` selects; `valid` holds every valid reward that it returned."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.mode = "valid"
        self.num_requests: dict[str, int] = {}
        self.valid: dict[str, float] = {}


class Answer(BaseHTTPRequestHandler):
    """One request."""

    server: FailingService

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        mode = self.server.mode
        self.server.num_requests[mode] = self.server.num_requests.get(mode, 0) + 1
        rewards = count_a(body["prompts"], body["responses"])
        items = [{"id": id, "reward": reward} for id, reward in zip(body["ids"], rewards, strict=True)]
        if mode == "down":
            self.connection.close()
        elif mode == "silent":
            time.sleep(3)
        elif mode in ("500", "429"):
            self._send(int(mode), "{}", {"Retry-After": "1"})
        elif mode == "valid":
            self.server.valid |= {item["id"]: item["reward"] for item in items}
            self._send(200, json.dumps({"rewards": items, "model_version": "failing@1"}))
        else:
            self._send(200, wrong(mode, items))

    def _send(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None: ...


def wrong(mode: str, items: list[dict[str, Any]]) -> str:
    """Return the body of a 200 response that is invalid in the given way."""
    answers: dict[str, Any] = {
        "nan": [item | {"reward": float("nan")} for item in items],
        "short": items[:-1] or [{"id": "unknown", "reward": 1.0}],
        "types": [item | {"reward": str(item["reward"])} for item in items],
        "nonsense": "no list",
    }
    return json.dumps({"rewards": answers[mode], "model_version": "failing@1"})


@pytest.fixture
def service() -> Iterator[FailingService]:
    failing = FailingService()
    threading.Thread(target=failing.serve_forever, daemon=True).start()
    yield failing
    failing.shutdown()
    failing.server_close()


def start(runs: Path, service: FailingService, *more: str) -> subprocess.Popen[str]:
    lines = (
        f"reward_service.url = 'http://127.0.0.1:{service.server_port}'",
        "reward_service.timeout_s = 2.0",
        f"learner.num_steps = {NUM_STEPS}",
        *more,
    )
    command = [sys.executable, "-m", "deploy.cli", "train", "examples/letters/fast.toml", "--runs-dir", str(runs)]
    settings = [part for line in lines for part in ("--set", line)]
    pipe, environment = subprocess.PIPE, os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, "--name", "outage", *settings], cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True
    )


def test_run_pauses_and_then_trains_all_groups_if_rewards_are_missing(tmp_path: Path, service: FailingService) -> None:
    run = tmp_path / "outage"
    process = start(tmp_path, service)
    wait_for(lambda: len(metrics(run)) >= 5, process, timeout_s=300)
    service.mode = "down"
    time.sleep(DOWN_S)
    num_paused = len(metrics(run))
    for mode in FAILURES:
        service.mode = mode
        time.sleep(EACH_S)
    assert len(metrics(run)) == num_paused < NUM_STEPS
    service.mode = "valid"
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors

    assert {"down", *FAILURES} <= set(service.num_requests)
    assert "paused: waiting for" in errors
    assert "rewards are back after" in errors
    files = sorted((run / "trajectories").glob("*.arrow"))
    trained = {t.uid: t.reward for file in files for t in read_trajectories(file)}
    assert len(files) == NUM_STEPS
    assert {uid: service.valid[uid] for uid in trained} == trained
    summary = json.loads((run / "summary.json").read_text())
    counts = [summary[f"num_{name}"] for name in ("admitted", "trained", "void", "open")]
    assert counts == [32 * NUM_STEPS, 32 * NUM_STEPS, 0, 0]


def test_a_run_ends_and_names_the_cause_if_patience_runs_out(tmp_path: Path, service: FailingService) -> None:
    process = start(tmp_path, service, "reward_service.patience_s = 5.0")
    wait_for(lambda: len(metrics(tmp_path / "outage")) >= 2, process, timeout_s=300)
    service.mode = "500"
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "in 5 s (reward_service.patience_s)" in errors.splitlines()[-1]
    assert "answered 500" in errors.splitlines()[-1]
