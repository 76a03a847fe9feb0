"""Measure what the recorder costs a letters run, how much it writes, and how fast a run is replayed.

Runs with the recorder and with one that keeps nothing alternate (A B B A); then every recorded run is replayed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.compute as pc

from benchmarks.parts.recorders import WAITS
from benchmarks.results import ROOT, Row
from benchmarks.tasks.runs import Finished, train
from cluster.journal.files import read_log
from deploy.run.layout import RECORDS

REPEATS, NUM_STEPS, NUM_SETTLING, NUM_LAST = 2, 100, 10, 2
BLOCKING = ("TRAIN", "PUBLISH")
"""Records that the training loop waits for."""


def measure(folder: Path, repeats: int = REPEATS, num_steps: int = NUM_STEPS) -> list[Row]:
    """Measure cost, waits, bytes and replay of `repeats` pairs of runs."""
    pairs = []
    for repeat in range(repeats):
        kinds = ("timed", "nothing") if repeat % 2 == 0 else ("nothing", "timed")
        runs = {kind: _run(folder, kind, repeat, num_steps) for kind in kinds}
        pairs.append((runs["timed"], runs["nothing"]))
    paths = [folder / f"timed-{repeat}" for repeat in range(repeats)]
    with_s, without_s = ([_steady_s(run) for run in runs] for runs in zip(*pairs, strict=True))
    costs = tuple(a / b - 1 for a, b in zip(with_s, without_s, strict=True))
    shares = [_waits_s(path) for path in paths]
    speeds = tuple(recorded.wall_s / _replay_s(path) for (recorded, _), path in zip(pairs, paths, strict=True))
    whole_s = [recorded.steps[-1]["time_s"] for recorded, _ in pairs]
    blocking = tuple(sum(waits[kind] for kind in BLOCKING) / s for waits, s in zip(shares, whole_s, strict=True))
    return [
        Row("cost of recording: time with the recorder over that with none, less 1", costs, "", "<= 0.02"),
        Row("share of the run that the training loop waits for the recorder", blocking),
        *(
            Row(f"calls of the recorder for {kind}, of the run's time, side by side", _share(shares, whole_s, kind))
            for kind in ("ADMIT", "TOKENS", *BLOCKING)
        ),
        Row("recorded, bytes a sampled token, everything included", tuple(map(_bytes_a_token, paths))),
        Row("speed of replay: time of the run's command over that of its replay", speeds, "x", ">= 1.5"),
    ]


def _run(folder: Path, kind: str, repeat: int, num_steps: int) -> Finished:
    lines = (f"run.seed = {repeat}", f"learner.num_steps = {num_steps}", "evaluation.every_steps = 1000")
    return train("letters", folder, f"{kind}-{repeat}", *lines, program=("benchmarks.parts.recorders", kind))


def _steady_s(run: Finished) -> float:
    """Return the time without the first steps and the last ones, during which nothing is sampled."""
    return float(run.steps[-1 - NUM_LAST]["time_s"] - run.steps[NUM_SETTLING]["time_s"])


def _waits_s(path: Path) -> dict[str, float]:
    waits: dict[str, float] = json.loads((path / WAITS).read_text())
    return waits


def _share(waits: list[dict[str, float]], whole_s: list[float], kind: str) -> tuple[float, ...]:
    return tuple(wait.get(kind, 0.0) / s for wait, s in zip(waits, whole_s, strict=True))


def _bytes_a_token(path: Path) -> float:
    tokens = read_log(path / RECORDS, ("token_ids",))["token_ids"]
    num_tokens: int = pc.sum(pc.list_value_length(tokens)).as_py()
    return sum(file.stat().st_size for file in (path / RECORDS).glob("records-*")) / num_tokens


def _replay_s(path: Path) -> float:
    started = time.monotonic()
    command = [sys.executable, "-m", "deploy.cli", "replay", str(path)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return time.monotonic() - started
