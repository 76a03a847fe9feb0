"""Lines that a person types or a pipe gives, waited for so that an interrupt ends the wait.

Knows no prompt and no answer.
"""

from __future__ import annotations

import io
import sys

from rollout_actors.environments.host import Threads


class TypedLines:
    """Lines of stdin, read off the event loop by a thread that holds no lock when this process ends before it."""

    def __init__(self) -> None:
        self.by_person = sys.stdin.isatty()
        self._threads = Threads(1)
        self._lines = io.FileIO(sys.stdin.fileno(), closefd=False)

    async def next(self) -> str | None:
        """The next line without its end; None where the input has ended."""
        line = await self._threads.run(self._lines.readline)
        return line.decode(errors="replace").rstrip("\r\n") if line else None
