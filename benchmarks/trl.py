"""The letters run against TRL 1.12.0's PPOTrainer, interleaved, each as a whole process.

Episodes/s with the same networks and settings, over the steps after the first; seconds to a mean reward of .9 counted
from the first step's start, Antiphon at the run file's own defaults (lag 1). Each is measured at one and two threads
and quoted at its better one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.letters import RUN_FILE, make_task
from benchmarks.results import Row

ROOT = Path(__file__).parent.parent
TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"
NUM_EPISODES, REPEATS, GOAL = 1600, 3, 0.9


@dataclass(frozen=True, slots=True)
class Curve:
    """Episodes, mean reward and seconds of every step of one run."""

    points: list[tuple[int, float, float]]

    def episodes_per_s(self) -> float:
        """Rate after the first update, which holds compilation and warm-up."""
        (first, _, started), (last, _, ended) = self.points[0], self.points[-1]
        return (last - first) / (ended - started)

    def seconds_to(self, reward: float) -> float:
        """Seconds until a step's mean reward reaches `reward`; infinity when it never does."""
        return next((time_s for _, mean, time_s in self.points if mean >= reward), float("inf"))


def run_trl(folder: Path, seed: int, num_threads: int) -> Curve:
    """One TRL run in its own environment."""
    model, _ = make_task(folder)
    # -P: beside the peer lies this module, whose name would hide the package trl.
    command = [str(TRL_PYTHON), "-P", str(ROOT / "benchmarks" / "trl_peer.py"), str(model)]
    command += ["--episodes", str(NUM_EPISODES), "--seed", str(seed), "--output", str(folder / "trl")]
    env = os.environ | {"OMP_NUM_THREADS": str(num_threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return Curve([(row["num_episodes"], row["reward_mean"], row["time_s"]) for row in rows])


def run_antiphon(folder: Path, seed: int, num_threads: int) -> Curve:
    """One `antiphon train examples/letters/run.toml`; time is counted from the start of the first step's sampling."""
    command = [sys.executable, "-m", "deploy.cli", "train", str(RUN_FILE), "--fresh", "--runs-dir", str(folder)]
    command += ["--name", "letters", "--set", f"run.seed = {seed}"]
    command += ["--set", f"learner.num_steps = {NUM_EPISODES // 64}", "--set", "evaluation.every_steps = 1000"]
    command += ["--set", f"learner.num_threads = {num_threads}"]
    subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    rows = [json.loads(line) for line in (folder / "letters" / "metrics.jsonl").read_text().splitlines()]
    ready_s = json.loads((folder / "letters" / "summary.json").read_text())["ready_s"]
    return Curve(
        [(r["num_episodes"], r["learner/reward_mean"], r["time_s"] - ready_s) for r in rows if r["stage"] == "ppo"]
    )


def measure(folder: Path) -> list[Row]:
    """Both in turn on `REPEATS` seeds, at the better number of threads of each (found on the first seed)."""
    threads = {run: max((1, 2), key=lambda n: run(folder, 0, n).episodes_per_s()) for run in (run_trl, run_antiphon)}
    curves = [
        (run_antiphon(folder, s, threads[run_antiphon]), run_trl(folder, s, threads[run_trl])) for s in range(REPEATS)
    ]
    return [
        Row(
            "letters: episodes/s over TRL's",
            tuple(ours.episodes_per_s() / theirs.episodes_per_s() for ours, theirs in curves),
            "x",
            ">= 2, 3 wanted",
        ),
        Row(
            "letters: how much sooner mean reward .9 is reached than by TRL",
            tuple(theirs.seconds_to(GOAL) / ours.seconds_to(GOAL) for ours, theirs in curves),
            "x",
            ">= 3, 5 wanted",
        ),
        Row("Antiphon, letters", tuple(ours.episodes_per_s() for ours, _ in curves), "episodes/s"),
        Row("TRL 1.12.0, letters", tuple(theirs.episodes_per_s() for _, theirs in curves), "episodes/s"),
        Row("Antiphon, letters, to mean reward .9", tuple(ours.seconds_to(GOAL) for ours, _ in curves), "s"),
        Row("TRL 1.12.0, letters, to mean reward .9", tuple(theirs.seconds_to(GOAL) for _, theirs in curves), "s"),
    ]
