"""How long a command takes to its first PPO step, by phase, in `summary.json` under `start_s`.

Phases that run side by side are each given their own seconds; `total` is what a person waited. Nothing is written by
a command that makes no PPO step.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

import psutil

from deploy.run.directory import RunDirectory


class StartUp:
    """The clock of one command, from the start of its process."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._seconds: dict[str, float] = defaultdict(float)
        self._seconds["command"] = _elapsed_s()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a phase that ends well; what is done in parts adds up."""
        started = time.monotonic()
        yield
        self._seconds[name] += time.monotonic() - started

    def first_step(self, *, waited_s: float, step_s: float) -> None:
        """The first PPO step is done: its batch was waited for, then it was learned from."""
        self._seconds |= {"first_batch": waited_s, "first_step": step_s, "total": _elapsed_s()}
        self._run.update_summary({f"start_s.{name}": round(seconds, 3) for name, seconds in self._seconds.items()})


def _elapsed_s() -> float:
    """Seconds since this process was started."""
    return time.time() - psutil.Process().create_time()
