"""Processes that a session started are waited for and, if they hang, killed."""

from __future__ import annotations

import asyncio
import atexit
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster.actors.remote import RemoteActor, kill_actor, process_of, start_actor
from deploy.runtime.processes import MARKER, end, is_alive, marked
from tests.support.paths import ROOT

pytestmark = pytest.mark.process

NUM_HUNG = 200


def start(session_id: str, *command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=os.environ | {MARKER: session_id})


def test_two_hundred_hung_processes_are_killed_and_named() -> None:
    stuck = [start("hung", "sh", "-c", "trap '' TERM; exec sleep 600") for _ in range(NUM_HUNG)]
    other = start("other", "sleep", "600")
    started = time.monotonic()
    while len(found := marked("hung")) < NUM_HUNG:
        assert time.monotonic() - started < 60
    killed = end(found, timeout_s=0.2)
    assert len(killed) == NUM_HUNG
    assert {f"sleep 600 (pid {process.pid})" for process in stuck} == set(killed)
    assert [process.wait(timeout=30) for process in stuck] == [-signal.SIGKILL] * NUM_HUNG
    assert marked("hung") == []
    assert other.poll() is None
    other.kill()
    other.wait()


def test_a_process_that_exits_in_time_is_not_killed() -> None:
    process = start("brief", "sleep", "0.3")
    assert end([psutil.Process(process.pid)], timeout_s=30) == []
    assert process.wait() == 0


def test_a_zombie_and_a_process_that_is_gone_are_not_waited_for() -> None:
    zombie, gone = start("zombie", "true"), start("gone", "true")
    looks = [psutil.Process(process.pid) for process in (zombie, gone)]
    gone.wait()
    while is_alive(looks[0]):
        time.sleep(0.01)
    started = time.monotonic()
    assert end(looks, timeout_s=30) == []
    assert time.monotonic() - started < 5
    zombie.wait()


class Freezing:
    """An actor whose process stops, as one that hangs in its exit does."""

    async def freeze(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)


async def _is_frozen(process: psutil.Process) -> None:
    async with asyncio.timeout(60):
        while process.status() != psutil.STATUS_STOPPED:
            await asyncio.sleep(0.01)


async def _frozen(actor: RemoteActor) -> psutil.Process:
    _, pid = await process_of(actor)
    frozen = psutil.Process(pid)
    freezing = asyncio.ensure_future(actor.freeze())
    await _is_frozen(frozen)
    freezing.cancel()
    return frozen


@pytest.mark.ray
async def test_an_actor_that_hangs_after_its_end_is_killed(ray_session: None) -> None:
    for number in range(3):
        session_id = f"hanging actor {number}"
        actor = start_actor(Freezing, name="freezing", env={MARKER: session_id})
        process = await _frozen(actor)
        kill_actor(actor)
        assert process.pid in {found.pid for found in marked(session_id)}
        (killed,) = end([process], timeout_s=0.5)
        assert killed.endswith(f"(pid {process.pid})")
        assert "Freezing" in killed
        assert end([process], timeout_s=30) == []


class HangingAtExit:
    """An actor whose process hangs in its exit, after it has left Ray; `file` appears when it hangs."""

    def __init__(self, file: Path) -> None:
        atexit.register(_hang, file)


def _hang(file: Path) -> None:
    file.touch()
    time.sleep(600)


SESSION = """
import asyncio, subprocess, sys
from pathlib import Path
from cluster.actors.remote import RemoteActor, process_of, start_actor
from deploy.config.schema import RunConfig
from deploy.run.directory import RunDirectory
from deploy.runtime.session import Session
from deploy.terminal.view import View
from tests.deploy.runtime.test_processes import HangingAtExit

async def main():
    folder = Path(sys.argv[1])
    config = RunConfig.model_validate({"model": {"path": "model"}})
    with View() as view:
        session = Session(config, RunDirectory(folder), view)
        hanging = subprocess.Popen(["sleep", "600"])
        print(hanging.pid)
        session.reaper.remember("stopped", hanging.pid)
        await session.stop_actor(RemoteActor("stopped", None))
        session.connect()
        for number in range(3):
            released = start_actor(HangingAtExit, folder / str(number), name="released")
            print((await process_of(released))[1])
            del released
            while not (folder / str(number)).exists():
                await asyncio.sleep(0.05)
        await session.close()

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(180)
def test_a_session_kills_actors_that_hang_and_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SESSION, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=170)
    assert done.returncode == 0, done.stderr
    pids = [int(line) for line in done.stdout.split()]
    notes = [line for line in done.stderr.splitlines() if line.startswith("killed ")]
    for pid in pids:
        assert any(f"(pid {pid}): it did not exit within 10 s" in note for note in notes), done.stderr
    assert len(notes) == len(pids) == 4
    assert not any(psutil.pid_exists(pid) and is_alive(psutil.Process(pid)) for pid in pids)
