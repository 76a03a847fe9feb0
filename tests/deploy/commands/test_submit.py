"""`antiphon submit` to a real Ray head with token authentication, and the errors before a submission."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cluster.errors import InputError
from deploy.commands.training import submit
from deploy.config.load import load_run_config
from deploy.run.open import open_run

TINY = """
[run]
stages = ["preferences"]
[model]
builder = "task:build"
[data]
preferences = "pairs.jsonl"
"""


@dataclass(frozen=True)
class Head:
    """A Ray head that these tests start."""

    address: str
    token: str

    def environment(self) -> dict[str, str]:
        return {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}


def free_ports(num: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(num)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    port, dashboard, agent, client, metrics = free_ports(5)
    head = Head(f"http://127.0.0.1:{dashboard}", secrets.token_hex(32))
    environment = {**head.environment(), "PATH": "/usr/bin:/bin", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
    with tempfile.TemporaryDirectory(prefix="ap", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [
            *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2"),
            *(f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
            *(f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}", f"--temp-dir={folder}"),
            *("--object-store-memory=100000000", "--disable-usage-stats", "--node-ip-address=127.0.0.1"),
        ]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        try:
            wait_until_ready(head, process)
            yield head
        finally:
            end(process)


def wait_until_ready(head: Head, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            return submit.require_ray(head.address)
        except InputError:
            time.sleep(0.2)
    pytest.fail(f"no Ray head after 60 s (exit code {process.poll()})")


def end(process: subprocess.Popen[bytes]) -> None:
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.terminate()
    _, alive = psutil.wait_procs(family, timeout=15)
    for survivor in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            survivor.kill()
    process.wait()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A working directory with a finished run and with folders that must not be uploaded."""
    project = tmp_path / "project"
    for name in (".git", ".venv", "runs", "__pycache__"):
        (project / name).mkdir(parents=True)
        (project / name / "big").write_text("x")
    (project / "run.toml").write_text(TINY)
    (project / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    (project / "task.py").write_text("def build(directory, *, seed):\n    print('built')\n")
    return project


def antiphon(project: Path, head: Head, *arguments: str, token: bool = True) -> subprocess.CompletedProcess[str]:
    environment = head.environment() if token else {**os.environ, "RAY_AUTH_MODE": "disabled"}
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.process
def test_submit_returns_exit_code_log_and_error_of_the_job(
    head: Head, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    with open_run(load_run_config(Path("run.toml")), project / "runs" / "project"):
        pass
    changed = ["--set", "sft.num_steps = 3"]
    job = antiphon(project, head, "submit", "run.toml", "--address", head.address, *changed)
    assert job.returncode == 2
    assert "Running entrypoint for job" in job.stdout
    last = job.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {project / 'runs' / 'project'}: settings have changed: sft.num_steps")


@pytest.mark.process
def test_submit_fails_without_a_token_if_the_cluster_requires_one(head: Head, project: Path) -> None:
    refused = antiphon(project, head, "submit", "run.toml", "--address", head.address, token=False)
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines()[-1].startswith(f"error: {head.address}: Ray rejects the token")


SUBMIT_LISTING = """
import sys, time
from pathlib import Path
from ray.job_submission import JobSubmissionClient
from deploy.commands.training import submit as jobs
from deploy.config.load import load_run_config
client = JobSubmissionClient(sys.argv[1])
command = f"{jobs.FIND_PYTHON} ls -A; echo interpreter $python"
job_id = client.submit_job(entrypoint=command, runtime_env=jobs.runtime_env(load_run_config(Path("run.toml"))))
while not client.get_job_status(job_id).is_terminal():
    time.sleep(0.2)
print(client.get_job_logs(job_id))
"""


@pytest.mark.process
def test_the_working_directory_is_uploaded_without_excluded_folders(head: Head, project: Path) -> None:
    env = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.token, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", SUBMIT_LISTING, head.address],
        cwd=project,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    assert f"interpreter {sys.executable}" in lines, done.stderr
    uploaded = [line for line in lines if line and not line.startswith(("interpreter", "Running")) and "\t" not in line]
    assert sorted(uploaded) == ["pairs.jsonl", "run.toml", "task.py"]


@pytest.mark.process
def test_submit_prints_the_next_commands_with_no_wait(head: Head, project: Path) -> None:
    submitted = antiphon(project, head, "submit", "run.toml", "--address", head.address, "--no-wait")
    assert submitted.returncode == 0
    assert "ray job logs -f" in submitted.stderr
    assert "ray job stop" in submitted.stderr


def test_submit_fails_if_no_ray_answers() -> None:
    (port,) = free_ports(1)
    with pytest.raises(InputError, match="no Ray answers at this address"):
        submit.require_ray(f"http://127.0.0.1:{port}")


def test_submit_fails_if_the_address_is_not_http() -> None:
    with pytest.raises(InputError, match="address of Ray's dashboard"):
        submit.require_ray("ray://127.0.0.1:10001")


def test_a_relative_runs_folder_is_accepted_only_on_this_machine(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    config = load_run_config(Path("run.toml"))
    assert submit.job_runs_dir(config, "http://127.0.0.1:8265") == project / "runs"
    with pytest.raises(InputError, match="runs is relative"):
        submit.job_runs_dir(config, "http://ray-head.example:8265")


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "http://ray-head.example:8265"])
def test_submit_fails_if_the_runs_folder_is_in_rays_session_folder(
    project: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.chdir(project)
    config = load_run_config(Path("run.toml"), ['run.runs_dir = "/tmp/ray/session_latest/runs"'])
    with pytest.raises(InputError, match="session folder"):
        submit.job_runs_dir(config, address)


def test_submit_fails_if_the_run_file_is_outside_the_working_directory(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project / "runs")
    with pytest.raises(InputError, match="is not in the working directory"):
        submit.entrypoint(project / "run.toml", [])


def test_the_job_gets_the_token_only_if_the_service_opens_a_port(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setenv("ANTIPHON_TOKEN", "secret")
    config = load_run_config(Path("run.toml"))
    assert "ANTIPHON_TOKEN" not in submit.runtime_env(config)["env_vars"]
    config = load_run_config(Path("run.toml"), ["reward_service.port = 8000"])
    assert submit.runtime_env(config)["env_vars"]["ANTIPHON_TOKEN"] == "secret"
