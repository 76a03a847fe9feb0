"""Run a command with another recorder: `python -m benchmarks.parts.recorders timed|nothing train ...`.

`timed` also measures how long calls wait for it, `nothing` keeps no records.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.journal.events import Record
from cluster.journal.recorder import Recorder
from deploy.cli import app
from deploy.run.stages import STAGES
from deploy.runtime.session import Session
from deploy.stages.ppo import run_ppo

WAITS = "recorder_waits_s.json"
"""In the run directory: seconds that calls waited, by the kind of their first record."""


class Timed(Recorder):
    """Recorder that measures how long its calls take, without their transport."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__(folder, **settings)
        self._path = folder.parent / WAITS
        self._waits_s = defaultdict[str, float](float)

    async def record(self, records: Sequence[Record]) -> None:
        """Record, and add the time it took to the kind of the first record."""
        started = time.monotonic()
        await super().record(records)
        self._waits_s[records[0]["kind"]] += time.monotonic() - started

    async def close(self) -> None:
        """Close, and write the measured times to `WAITS`."""
        await super().close()
        self._path.write_text(json.dumps(self._waits_s))


class KeepsNothing:
    """Recorder that drops every record."""

    def __init__(self, folder: Path, **settings: Any) -> None: ...

    async def open(self) -> None:
        """Do nothing."""

    async def begin(
        self, incarnation: str, *, version: int, group: int, num_steps: int, settings: str | None = None
    ) -> None:
        """Do nothing."""

    async def record(self, records: Sequence[Record]) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Do nothing."""


async def run_timed(session: Session) -> None:
    """Run the PPO stage with `Timed`."""
    await run_ppo(session, recorder_class=Timed)


async def run_without(session: Session) -> None:
    """Run the PPO stage with `KeepsNothing`."""
    await run_ppo(session, recorder_class=KeepsNothing)


STAGE_FUNCTIONS = {"timed": run_timed, "nothing": run_without}


def main() -> None:
    """Run an `antiphon` command whose PPO stage uses another recorder, named by the first argument."""
    function = STAGE_FUNCTIONS[sys.argv.pop(1)]
    STAGES["ppo"] = replace(STAGES["ppo"], function=f"{__name__}:{function.__name__}")
    app()


if __name__ == "__main__":
    # Actors are pickled by module name, so the classes must not belong to __main__.
    importlib.import_module("benchmarks.parts.recorders").main()
