"""The standalone reward service in a separate process, over real HTTP, until it is interrupted."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import psutil
import pytest

from tests.support.paths import ROOT

TOKEN = "a token of this test"
PROGRAM = """
import sys
from pathlib import Path
from cluster.errors import AntiphonError
from deploy.commands.rewards.standalone_service import serve
from reward_service.config.service import RewardServiceConfig
scorer, host, port = sys.argv[1:]
try:
    config = RewardServiceConfig(scorer=scorer)
    serve(config, reward_model_path=None, host=host, port=int(port), name="alone", run_path=Path("none"))
except AntiphonError as error:
    sys.exit(f"error: {error}")
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(scorer: str, host: str, port: int) -> list[str]:
    return [sys.executable, "-W", "ignore", "-c", PROGRAM, f"tests.support.scorers:{scorer}", host, str(port)]


@contextmanager
def running(scorer: str, port: int) -> Iterator[subprocess.Popen[str]]:
    """Run the service in a new process group; yields once it prints "listening on URL"."""
    process = subprocess.Popen(
        command(scorer, "127.0.0.1", port),
        cwd=ROOT,
        env=os.environ | {"ANTIPHON_TOKEN": TOKEN},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == f"listening on http://127.0.0.1:{port}\n"
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=60)


def ask(http: httpx.Client, *responses: str) -> list[tuple[float | None, str | None]]:
    answer = http.post("/v1/rewards", json={"prompts": ["p"] * len(responses), "responses": responses})
    assert answer.status_code == 200
    return [(item["reward"], item["error"]) for item in answer.json()["rewards"]]


@pytest.mark.slow
@pytest.mark.ray
def test_it_serves_until_interrupted_and_leaves_no_process() -> None:
    port = free_port()
    with running("wrong_on_demand", port) as process:
        url = f"http://127.0.0.1:{port}"
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=30) as http:
            (good, no_error), (none, error) = ask(http, "one", "nan")
            assert (good, no_error, none) == (1.0, None, None)
            assert error == "tests.support.scorers:wrong_on_demand: returned float nan, not a finite number (scoring 1)"
            assert "/v1/rewards" in http.get("/openapi.json").json()["paths"]
            broken = http.post("/v1/rewards", content="{", headers={"Content-Type": "application/json"})
            assert (broken.status_code, broken.json()["error"]["code"]) == (400, "malformed")
            assert http.post("/v1/rewards", json={"prompts": ["p"]}).status_code == 422
        assert httpx.get(f"{url}/healthz", trust_env=False).status_code == 200
        assert httpx.get(f"{url}/openapi.json", trust_env=False).status_code == 401

        parts = psutil.Process(process.pid).children(recursive=True)
        assert len(parts) > 3
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, ""), err
        assert psutil.wait_procs(parts, timeout=10)[1] == []


@pytest.mark.process
def test_it_does_not_start_beyond_loopback_without_a_token() -> None:
    env = {key: value for key, value in os.environ.items() if key != "ANTIPHON_TOKEN"}
    process = subprocess.run(
        command("length", "0.0.0.0", free_port()), cwd=ROOT, env=env, capture_output=True, text=True, timeout=100
    )
    assert process.returncode == 1
    expected = "error: reward_service.host: 0.0.0.0 can be reached from other machines: set ANTIPHON_TOKEN, or "
    assert process.stderr.strip().splitlines()[-1].startswith(expected)
