"""`antiphon scale` from a separate process, on the Ray of a running run."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.actors.control import RunControl, control_name
from cluster.actors.remote import RemoteActor, kill_actor, start_actor
from deploy.config.load import load_run_config
from deploy.run.directory import RunDirectory
from deploy.run.open import open_run

TINY = '[model]\nbuilder = "task:build"\n[data]\nbuilder = "task:data"\n[preferences]\nannotator = "task:judge"\n'


@pytest.fixture
def run_path(tmp_path: Path) -> Path:
    (tmp_path / "run.toml").write_text(TINY)
    config = load_run_config(tmp_path / "run.toml", ['run.name = "scaled"'])
    with open_run(config, tmp_path / "runs" / "scaled") as run:
        run.update_status(state="RUNNING", stage="ppo")
        return run.path


def set_address(run_path: Path, address: str) -> None:
    RunDirectory(run_path).update_status(ray_address=address)


def scale(run_path: Path, num: int) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "deploy.cli", "scale", str(run_path), "--rollout-actors", str(num)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ})
    return done.returncode, done.stdout, (done.stderr.splitlines() or [""])[-1]


@pytest.mark.ray
def test_scale_reaches_a_running_run(ray_session: None, run_path: Path) -> None:
    import ray

    set_address(run_path, ray.get_runtime_context().gcs_address)
    code, _, last = scale(run_path, 3)
    registered_as = control_name(RunDirectory(run_path).name_on_ray("scaled"))
    assert (code, last) == (2, f"error: {registered_as}: no such actor on this Ray: its run is not running")

    control = start_actor(RunControl, 1, name="run_control", registered_as=registered_as)
    try:
        assert asyncio.run(_set(control, 1)) == 1
        assert scale(run_path, 3) == (0, "rollout actors: 1 -> 3\n", "")
        assert asyncio.run(_set(control, 3)) == 3
    finally:
        kill_actor(control)


async def _set(control: RemoteActor, num: int) -> int:
    now: int = await control.set_num_rollout_actors(num)
    return now


@pytest.mark.process
def test_scale_names_the_run_if_its_process_is_gone(run_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    set_address(run_path, f"127.0.0.1:{port}")
    code, _, last = scale(run_path, 3)
    assert (code, last) == (2, f"error: {run_path}: no Ray answers at 127.0.0.1:{port}: the run's process is gone")
