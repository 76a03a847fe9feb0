"""Measures the time from a command's start to its first PPO step, by phase; written to `start_s` in summary.json.

Phases may overlap, each has its own seconds; `total` is the time that passed. A command without a PPO step writes
nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

import psutil

from deploy.run.directory import RunDirectory
from deploy.terminal.view import View

PARTS = {
    "ray": "Ray",
    "rollout_actors": "engine",
    "reward_service": "reward service",
    "learner_group": "learner",
}
"""Phase -> its name in the view; other phases are not shown."""


class StartUp:
    """Times the phases of one command, from the start of its process, and shows them in its view."""

    def __init__(self, run: RunDirectory, view: View) -> None:
        self._run = run
        self._view = view
        self._seconds: dict[str, float] = defaultdict(float)
        self._seconds["command"] = _elapsed_s()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase if it succeeds; repeated phases add up."""
        started, part = time.monotonic(), PARTS.get(name)
        with self._view.starting(part) if part else contextlib.nullcontext():
            yield
        self._seconds[name] += time.monotonic() - started

    def first_step(self, *, waited_s: float, step_s: float) -> None:
        """Write the times once the first PPO step is done: `waited_s` for its batch, then `step_s` of training."""
        self._seconds |= {"first_batch": waited_s, "first_step": step_s, "total": _elapsed_s()}
        self._run.update_summary({f"start_s.{name}": round(seconds, 3) for name, seconds in self._seconds.items()})


def _elapsed_s() -> float:
    """Return the seconds since this process was started."""
    return time.time() - psutil.Process().create_time()
