"""Read lines from stdin without blocking the event loop, so that an interrupt ends the wait."""

from __future__ import annotations

import io
import sys

from rollout_actors.environments.host import Threads


class TypedLines:
    """Reads lines of stdin in a thread that holds no lock, so that the process can exit while it waits."""

    def __init__(self) -> None:
        self.by_person = sys.stdin.isatty()
        self._threads = Threads(1)
        self._lines = io.FileIO(sys.stdin.fileno(), closefd=False)

    async def next(self) -> str | None:
        """Return the next line without its line break, or None at the end of the input."""
        line = await self._threads.run(self._lines.readline)
        return line.decode(errors="replace").rstrip("\r\n") if line else None
