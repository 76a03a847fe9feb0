"""Half an hour of a real run whose rollout actor is killed again and again: nothing of it grows.

For `make chaos`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

import psutil
import pytest

from cluster.journal.history import History
from tests.runs.test_commands import actors_of, metrics, started_by, wait_for
from tests.support.paths import LETTERS, ROOT
from tests.support.processes import command_of
from tests.support.processes import name_of as process_name

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(2700)]

MINUTES, SAMPLE_EVERY_S, KILL_EVERY_S = 30, 5.0, 100.0
EARLY, LATE = (5, 15), (MINUTES - 10, MINUTES)
LOG_MONITOR = "log_monitor"
"""Ray's own, which holds a file open for every process that died, up to 200 (RAY_LOG_MONITOR_MAX_OPEN_FILES)."""
SETTINGS = (
    "learner.num_steps = 1000000",
    "evaluation.every_steps = 200",
    "rollout_actors.max_restarts = 1000",
)


@dataclass
class Watched:
    """What a run's processes held, sample by sample; descriptors and threads of those that lived all the time."""

    minutes: list[float] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)
    shared_bytes: list[int] = field(default_factory=list)
    held: dict[int, list[tuple[float, str, int, int, int]]] = field(default_factory=lambda: defaultdict(list))
    kills: list[float] = field(default_factory=list)

    def sample(self, processes: Sequence[psutil.Process], minute: float) -> None:
        """Add what these hold now."""
        memory = shared = 0
        for process in processes:
            try:
                pss, shmem = _pss_bytes(process.pid)
                counts = process.num_fds(), process.num_threads()
                self.held[process.pid].append((minute, name_of(process), *counts, pss))
            except (psutil.Error, OSError):  # it has ended since it was listed
                continue
            memory, shared = memory + pss, shared + shmem
        self.minutes.append(minute)
        self.memory_bytes.append(memory)
        self.shared_bytes.append(shared)

    def mean(self, values: Sequence[int], span: tuple[int, int]) -> float:
        """Over the samples of these minutes."""
        return fmean(v for minute, v in zip(self.minutes, values, strict=True) if span[0] <= minute < span[1])

    def growth(self) -> dict[str, tuple[float, float, float]]:
        """By process that lived all the time: descriptors, threads and MiB late, less early, medians all."""
        found = {}
        for pid, samples in self.held.items():
            early, late = ([s for s in samples if span[0] <= s[0] < span[1]] for span in (EARLY, LATE))
            if early and late and early[0][0] < EARLY[0] + 1 and late[-1][0] > LATE[1] - 1:
                before, after = (
                    [median(kind) for kind in zip(*(s[2:] for s in part), strict=True)] for part in (early, late)
                )
                fds, threads, memory = (b - a for a, b in zip(before, after, strict=True))
                found[f"{samples[-1][1]} {pid}"] = (fds, threads, round(memory / 2**20, 1))
        return found


def _pss_bytes(pid: int) -> tuple[int, int]:
    """Proportional set size of a process, and of it what is shared memory: the object store's."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
    return values["Pss"], values["Pss_Shmem"]


def name_of(process: psutil.Process) -> str:
    """Its name; Ray's log monitor is a python like others."""
    return LOG_MONITOR if any(LOG_MONITOR in part for part in command_of(process)) else process_name(process)


def watch(process: subprocess.Popen[str]) -> Watched:
    """Half an hour of samples; the rollout actor that is there is killed every KILL_EVERY_S seconds."""
    watched, started, next_kill_s = Watched(), time.monotonic(), KILL_EVERY_S
    while (now_s := time.monotonic() - started) < MINUTES * 60:
        assert process.poll() is None, "the run ended"
        watched.sample([psutil.Process(process.pid), *started_by(process)], now_s / 60)
        if now_s >= next_kill_s and (alive := actors_of(process)):
            alive[-1].kill()
            watched.kills.append(now_s)
            next_kill_s += KILL_EVERY_S
        time.sleep(SAMPLE_EVERY_S)
    return watched


def test_memory_files_and_threads_do_not_grow_in_half_an_hour_with_kills(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [part for line in SETTINGS for part in ("--set", line)]
    command = [sys.executable, "-m", "deploy.cli", "train", LETTERS, "--runs-dir", str(tmp_path), *lines]
    run, printed = tmp_path / "letters", tmp_path / "printed"
    with printed.open("w") as file:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, text=True)
        try:
            wait_for(lambda: len(metrics(run)) >= 10, process, timeout_s=500)
            watched = watch(process)
            process.send_signal(signal.SIGINT)
            process.wait(timeout=120)
        finally:
            process.kill()
    counts, num_steps = History(run / "records").counts(), len(metrics(run))
    memory, shared = (
        [watched.mean(values, span) / 2**20 for span in (EARLY, LATE)]
        for values in (watched.memory_bytes, watched.shared_bytes)
    )
    with capsys.disabled():
        print(f"\n{len(watched.kills)} kills in {MINUTES} minutes, {num_steps:,} steps, {counts}")
        print(f"memory {memory[0]:.0f} -> {memory[1]:.0f} MiB, of it shared {shared[0]:.1f} -> {shared[1]:.1f} MiB")
        print(f"descriptors, threads and MiB more than before: {watched.growth()}")
    assert counts.num_admitted == counts.num_trained + counts.num_void + counts.num_open
    assert len(watched.kills) >= 15
    assert memory[1] <= 1.05 * memory[0]
    assert shared[1] <= 1.05 * shared[0] + 1
    assert len(watched.growth()) >= 6
    growth = {name: counts for name, counts in watched.growth().items() if not name.startswith(LOG_MONITOR)}
    assert all(abs(n) <= 5 for fds, threads, _ in growth.values() for n in (fds, threads))
