"""`antiphon serve-rewards RUN` while its run retrains the reward model, and when it is terminated."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.scoring import Score, ScoreRequest
from deploy.config.load import load_run_config
from deploy.run.directory import RunDirectory
from deploy.run.layout import TRAINING
from deploy.run.open import open_run
from deploy.run.reward_models import publish
from reward_service.scorers.reward_model import RewardModelScorer
from tests.support.building import moved_model
from tests.support.paths import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow]
RUN = """
[run]
name = "live"
stages = ["ppo"]
[model]
path = "model"
[data]
prompts = "prompts.jsonl"
[reward_service]
num_cpus = 0.1
[reward_service.scorers]
gated = { kind = "function", path = "tests.support.scorers:gated" }
"""
PUBLISH = """
import pathlib, sys
from deploy.runtime.connect import use_own_token
use_own_token()
from deploy.runtime.services import publish_to_services
print(publish_to_services(pathlib.Path(sys.argv[1])))
"""
MEASURED = ("accuracy", "held_out_accuracy", "held_out_loss", "ece", "nll", "margin_mean", "best_step")
COUNTED = {"num_examples": 1, "num_cut": 0, "num_dropped": 0, "num_held_out": 0}
TRAINED: dict[str, Any] = dict.fromkeys(MEASURED, 0.5) | COUNTED | {"data": [], "settings": {}}


@dataclass
class Service:
    """A running service: its run, its process and its port."""

    run: RunDirectory
    process: subprocess.Popen[str]
    port: int

    def ask(self, scorer: str | None = None, references: list[Any] | None = None) -> dict[str, Any]:
        body: dict[str, Any] = {"prompts": ["say "], "responses": ["abc"]}
        body |= {"scorer": scorer} if scorer else {}
        body |= {"references": references} if references else {}
        url = f"http://127.0.0.1:{self.port}/v1/rewards"
        return dict(httpx.post(url, json=body, trust_env=False, timeout=60).raise_for_status().json())


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, reward_model_folder: Path) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("live")
    (folder / "run.toml").write_text(RUN)
    with open_run(load_run_config(folder / "run.toml"), folder / "run") as run:
        shutil.copytree(reward_model_folder, run.path / "reward_model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    env = {key: value for key, value in os.environ.items() if key != "ANTIPHON_TOKEN"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "deploy.cli", "serve-rewards", str(run.path), "--port", str(port)]
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"listening on http://127.0.0.1:{port}\n", process.stderr
        yield Service(run, process, port)
    finally:
        process.terminate()
        process.communicate(timeout=60)


def reward_of(folder: Path) -> Score:
    (score,) = RewardModelScorer(folder).score_batch([ScoreRequest("0", "say ", "abc")])
    assert isinstance(score, Score)
    return score


def test_a_retrained_reward_model_reaches_the_running_service(service: Service) -> None:
    old = reward_of(service.run.path / "reward_model")
    following = service.run.path / TRAINING / "reward_model"
    moved_model(service.run.path / "reward_model", following)
    (following / "training.json").write_text(json.dumps(TRAINED))
    new = reward_of(following)
    publish(service.run)
    assert service.ask()["model_version"] == old.scorer_version
    command = [sys.executable, "-W", "ignore", "-c", PUBLISH, str(service.run.path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == [f"[{service.port}]"], done.stderr
    for scorer, expected in ((None, new), (new.scorer_version, new), (old.scorer_version, old)):
        answer = service.ask(scorer)
        assert answer["model_version"] == expected.scorer_version
        assert answer["rewards"][0]["reward"] == pytest.approx(expected.reward, abs=1e-6)


def test_it_answers_pending_requests_before_it_terminates(service: Service, tmp_path: Path) -> None:
    begun, proceed = tmp_path / "begun", tmp_path / "proceed"
    answers: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: answers.append(service.ask("gated", [[str(begun), str(proceed)]])))
    asking.start()
    wait_until(begun.exists)
    service.process.send_signal(signal.SIGTERM)
    wait_until(lambda: not takes_connections(service.port))
    assert service.process.poll() is None
    proceed.touch()
    asking.join(30)
    assert [item["reward"] for item in answers[0]["rewards"]] == [3.0]
    _, errors = service.process.communicate(timeout=60)
    assert (service.process.returncode, errors) == (0, "")
    assert list((service.run.path / "serving").iterdir()) == []


def wait_until(is_so: Any) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def takes_connections(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
