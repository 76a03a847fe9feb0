"""Waits for the processes that a session started, and kills those that do not exit.

Ray can hang in the exit of a worker (2.60: `CoreWorkerProcess::HandleAtExit`), which would leave the process behind
with its memory. Workers are found by an environment variable, so only those on this machine are.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Iterable, Sequence

import psutil

MARKER = "ANTIPHON_SESSION"
"""Environment variable of every worker of a session; its value is unique to the session."""
EXIT_TIMEOUT_S = 10.0
LOOK_EVERY_S = 0.05


class Reaper:
    """Ends the processes of one session that do not exit; `note` is called with each that was killed.

    `session_id` is the value of MARKER for the session's workers.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self.session_id = uuid.uuid4().hex
        self._note = note
        self._remembered: dict[str, psutil.Process] = {}
        self._ending = set[asyncio.Task[None]]()

    def remember(self, name: str, pid: int) -> None:
        """Remember the process of an actor on this machine."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._remembered[name] = psutil.Process(pid)

    def end_later(self, name: str) -> None:
        """Wait in the background for the process of an actor that was stopped."""
        process = self._remembered.pop(name, None)
        if process is not None:
            ending = asyncio.create_task(self._end([process]))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)

    async def end_all(self) -> None:
        """Wait for all processes of the session, once its Ray has ended."""
        await self._end(await asyncio.to_thread(marked, self.session_id))

    async def close(self) -> None:
        """Wait for the processes of stopped actors."""
        await asyncio.gather(*self._ending)

    async def _end(self, processes: Sequence[psutil.Process]) -> None:
        for name in await asyncio.to_thread(end, processes):
            self._note(f"killed {name}: it did not exit within {EXIT_TIMEOUT_S:g} s")


def marked(session_id: str) -> list[psutil.Process]:
    """Return the running processes of a session on this machine."""
    return [process for process in psutil.process_iter() if _is_marked(process, session_id)]


def _is_marked(process: psutil.Process, session_id: str) -> bool:
    try:
        return process.environ().get(MARKER) == session_id
    except (psutil.Error, OSError):  # it has ended, or belongs to another user
        return False


def end(processes: Iterable[psutil.Process], *, timeout_s: float = EXIT_TIMEOUT_S) -> list[str]:
    """Wait until the processes have exited; kill those that are left after `timeout_s` and return who they are."""
    deadline = time.monotonic() + timeout_s
    left = [process for process in processes if is_alive(process)]
    while left and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY_S)
        left = [process for process in left if is_alive(process)]
    return [name for process in left if (name := _kill(process)) is not None]


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _kill(process: psutil.Process) -> str | None:
    """Kill a process; returns its title and id, or None if it ended before."""
    try:
        title = " ".join(process.cmdline()).strip() or process.name()
        process.kill()
    except psutil.NoSuchProcess:
        return None
    return f"{title} (pid {process.pid})"
