"""Seconds from the command to the first PPO step of reviews, the earlier stages being done, by phase."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.results import ROOT, Row
from benchmarks.tasks.runs import train

REPEATS = 3
SHORT = ("sft.num_steps = 50", "preferences.num_pairs = 512", "preferences.num_held_out_pairs = 0")
AFTER_PPO = ("checkpoints", "policy", "trajectories", "metrics.jsonl", "summary.json", "status.json")
SIDE_BY_SIDE = ("rollout_actors", "reward_service", "learner_group")


def measure(folder: Path) -> list[Row]:
    """Run every stage once, briefly; then run PPO alone on copies of the run, each by a separate command."""
    train("reviews", folder, "short", *SHORT, "learner.num_steps = 1", "evaluation.num_prompts = 8")
    starts = []
    for repeat in range(REPEATS):
        copy = folder / f"copy-{repeat}"
        shutil.copytree(folder / "short", copy, ignore=shutil.ignore_patterns(*AFTER_PPO))
        subprocess.run(
            [sys.executable, "-m", "deploy.cli", "ppo", str(copy)], cwd=ROOT, check=True, capture_output=True
        )
        starts.append(json.loads((copy / "summary.json").read_text())["start_s"])
    phases = {phase: tuple(start[phase] for start in starts) for phase in starts[0]}
    total = phases.pop("total")
    parts = ", ".join(f"{phase} {statistics.median(values):.0f}" for phase, values in phases.items())
    figure = f"command to first PPO step, earlier stages done ({parts}; {', '.join(SIDE_BY_SIDE)} side by side)"
    rows = [Row(f"phase {phase}", values, "s") for phase, values in phases.items()]
    return [Row(figure, total, "s", "by phase"), *rows]
