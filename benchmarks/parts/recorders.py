"""Other recorders for the same commands: `python -m benchmarks.parts.recorders timed|nothing train ...`.

One that also tells how long it was waited for, and one that keeps nothing. Knows no figure.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.journal.events import Record
from cluster.journal.recorder import Recorder
from deploy.run.stages import STAGES
from deploy.runtime.session import Session
from deploy.stages.ppo import run_ppo

WAITS = "recorder_waits_s.json"
"""In the run directory: seconds that calls waited, by the kind of their first record."""


class Timed(Recorder):
    """The recorder, with a watch; the way to it and back is not in it."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__(folder, **settings)
        self._path = folder.parent / WAITS
        self._waits_s = Counter[str]()

    async def record(self, records: Sequence[Record]) -> None:
        """As Recorder does."""
        started = time.monotonic()
        await super().record(records)
        self._waits_s[records[0]["kind"]] += time.monotonic() - started

    async def close(self) -> None:
        """As Recorder does, and write down what was waited."""
        await super().close()
        self._path.write_text(json.dumps(self._waits_s))


class KeepsNothing:
    """In the place of a recorder."""

    def __init__(self, folder: Path, **settings: Any) -> None: ...

    async def open(self) -> None:
        """Nothing."""

    async def begin(self, incarnation: str, *, version: int, group: int, num_steps: int) -> None:
        """Nothing."""

    async def record(self, records: Sequence[Record]) -> None:
        """Nothing."""

    async def close(self) -> None:
        """Nothing."""


async def run_ppo_timed(session: Session) -> None:
    """Run the PPO stage with the recorder `Timed`."""
    await run_ppo(session, recorder_class=Timed)


async def run_ppo_with_nothing(session: Session) -> None:
    """Run the PPO stage with the recorder `KeepsNothing`."""
    await run_ppo(session, recorder_class=KeepsNothing)


FUNCTIONS = {"timed": run_ppo_timed, "nothing": run_ppo_with_nothing}


def main() -> None:
    """Run an `antiphon` command whose PPO stage has another recorder."""
    from deploy.cli import app

    function = f"benchmarks.parts.recorders:{FUNCTIONS[sys.argv.pop(1)].__name__}"
    STAGES["ppo"] = replace(STAGES["ppo"], function=function)
    app()


if __name__ == "__main__":
    # Actors are pickled by module name, so the classes must not belong to __main__.
    importlib.import_module("benchmarks.parts.recorders").main()
