"""Compare the letters run with TRL 1.12.0's PPOTrainer; both run as whole processes, alternating.

Episodes/s use the same networks and settings (`run.toml`), over the steps after the first. Each side uses one or two
threads, whichever is faster on the first seed; for Antiphon two threads are two learners of one thread each. The time
to a mean reward of .9 over the last 64 episodes or more starts with the first step: TRL with the settings of the
reference curve, Antiphon with those and with its own (`fast.toml`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import ROOT, Row
from benchmarks.tasks.letters import FAST_RUN_FILE, RUN_FILE, make_task
from deploy.config.load import load_run_config

TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"
PEER = Path(__file__).with_name("trl_peer.py")
NUM_EPISODES, REPEATS, GOAL, WINDOW = 1600, 3, 0.9, 64


@dataclass(frozen=True, slots=True)
class Curve:
    """Episodes, mean reward and seconds of every step of one run."""

    points: list[tuple[int, float, float]]

    def episodes_per_s(self) -> float:
        """Return the rate after the first update, which includes compilation and warm-up."""
        (first, _, started), (last, _, ended) = self.points[0], self.points[-1]
        return (last - first) / (ended - started)

    def seconds_to(self, reward: float) -> float:
        """Return the seconds until the mean reward of the last WINDOW or more episodes is `reward`, or infinity."""
        ends = [0, *(num_episodes for num_episodes, _, _ in self.points)]
        sums = [(end - start) * mean for start, end, (_, mean, _) in zip(ends, ends[1:], self.points, strict=False)]
        for last in range(len(sums)):
            first = max((i for i in range(last + 1) if ends[last + 1] - ends[i] >= WINDOW), default=None)
            if first is not None and sum(sums[first : last + 1]) >= reward * (ends[last + 1] - ends[first]):
                return self.points[last][2]
        return float("inf")


def run_trl(folder: Path, seed: int, num_threads: int) -> Curve:
    """Run TRL once in its own virtual environment."""
    model, _ = make_task(folder)
    # -P: without it, this module, in the same folder as the peer, would hide the package trl.
    command = [str(TRL_PYTHON), "-P", str(PEER), str(model)]
    command += ["--episodes", str(NUM_EPISODES), "--seed", str(seed), "--output", str(folder / "trl")]
    env = os.environ | {"OMP_NUM_THREADS": str(num_threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return Curve([(row["num_episodes"], row["reward_mean"], row["time_s"]) for row in rows])


def run_antiphon(folder: Path, seed: int, num_threads: int, run_file: Path = RUN_FILE) -> Curve:
    """Run `antiphon train` on letters once. Time starts when the first step's sampling starts."""
    groups_per_step = load_run_config(run_file).trajectory_queue.groups_per_step
    command = [sys.executable, "-m", "deploy.cli", "train", str(run_file), "--fresh", "--runs-dir", str(folder)]
    command += ["--name", "letters", "--set", f"run.seed = {seed}"]
    command += ["--set", f"learner.num_steps = {NUM_EPISODES // groups_per_step}"]
    command += ["--set", "evaluation.every_steps = 1000", "--set", "learner.num_threads = 1"]
    command += ["--set", f"learner.num_learners = {num_threads}"]
    subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    rows = [json.loads(line) for line in (folder / "letters" / "metrics.jsonl").read_text().splitlines()]
    ready_s = json.loads((folder / "letters" / "summary.json").read_text())["ready_s"]
    return Curve(
        [(r["num_episodes"], r["learner/reward_mean"], r["time_s"] - ready_s) for r in rows if r["stage"] == "ppo"]
    )


def measure(folder: Path) -> list[Row]:
    """Measure all runs alternately on `REPEATS` seeds."""
    threads = {run: max((1, 2), key=lambda n: run(folder, 0, n).episodes_per_s()) for run in (run_trl, run_antiphon)}
    ours, fast, theirs = [], [], []
    for seed in range(REPEATS):
        ours.append(run_antiphon(folder, seed, threads[run_antiphon]))
        theirs.append(run_trl(folder, seed, threads[run_trl]))
        fast.append(run_antiphon(folder, seed, 1, FAST_RUN_FILE))
    goals = [tuple(curve.seconds_to(GOAL) for curve in curves) for curves in (ours, fast, theirs)]
    rates = [tuple(curve.episodes_per_s() for curve in curves) for curves in (ours, fast, theirs)]
    return [
        Row("letters: episodes/s over TRL's, same networks", _ratios(rates[0], rates[2]), "x", ">= 2, 3 wanted"),
        Row(
            "letters: how much sooner than TRL at mean reward .9, own settings",
            _ratios(goals[2], goals[1]),
            "x",
            ">= 3, 5 wanted",
        ),
        Row("the same with TRL's settings", _ratios(goals[2], goals[0]), "x"),
        Row(f"Antiphon, letters ({threads[run_antiphon]} learners of one thread)", rates[0], "episodes/s"),
        Row("Antiphon, letters, own settings (1 learner)", rates[1], "episodes/s"),
        Row(f"TRL 1.12.0, letters ({threads[run_trl]} threads)", rates[2], "episodes/s"),
        Row("Antiphon, letters, to mean reward .9", goals[0], "s"),
        Row("Antiphon, letters, own settings, to mean reward .9", goals[1], "s"),
        Row("TRL 1.12.0, letters, to mean reward .9", goals[2], "s"),
    ]


def _ratios(numerators: tuple[float, ...], denominators: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(a / b for a, b in zip(numerators, denominators, strict=True))
