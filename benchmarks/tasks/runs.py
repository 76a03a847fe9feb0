"""The figures of whole runs on three seeds, each the command a person types: the reviews demo and the letters curve."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT, Row

SEEDS = (0, 1, 2)
OTHER_LOSSES = {
    "IPO": ('dpo.loss = "ipo"', "dpo.beta = 0.5"),
    "KTO": ('dpo.loss = "kto"',),
}
"""Losses of the stage dpo beside the run file's -> the settings of their runs."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished run: its summary, the rows of its PPO steps, and how long the command took."""

    summary: dict[str, Any]
    steps: list[dict[str, Any]]
    wall_s: float


def train(
    task: str,
    folder: Path,
    name: str,
    *lines: str,
    file: str = "run.toml",
    fresh: bool = True,
    program: Sequence[str] = ("deploy.cli",),
) -> Finished:
    """`antiphon train`, or another `program`'s, on a task's run file with these `--set` lines; a finished run is done
    again if `fresh`."""
    command = [sys.executable, "-m", *program, "train", f"examples/{task}/{file}", *(["--fresh"] if fresh else [])]
    command += ["--runs-dir", str(folder), "--name", name]
    for line in lines:
        command += ["--set", line]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"COLUMNS": "120"})
    wall_s = time.monotonic() - started
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} exited {done.returncode}: {done.stderr[-2000:]}")
    run = folder / name
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return Finished(json.loads((run / "summary.json").read_text()), [r for r in rows if r["stage"] == "ppo"], wall_s)


def reviews(folder: Path) -> list[Row]:
    """Before and after PPO, the reward model, time and memory of the demo; and the hacked run beside it."""
    runs = [train("reviews", folder, f"reviews-{seed}", f"run.seed = {seed}") for seed in SEEDS]
    hacked = train("reviews", folder, "hacked", "learner.kl_coefficient = 0.0")

    def after(metric: str) -> tuple[float, ...]:
        return tuple(run.summary["evaluation"]["after"][metric] for run in runs)

    def before(metric: str) -> tuple[float, ...]:
        return tuple(run.summary["evaluation"]["before"][metric] for run in runs)

    gaps = tuple(r.summary["reward_model"]["noise_ceiling"] - r.summary["reward_model"]["accuracy"] for r in runs)
    steps = [step for run in runs for step in run.steps]
    return [
        Row("oracle before PPO", before("oracle"), "of 4"),
        Row("oracle after PPO", after("oracle"), "of 4", ">= 3.5"),
        Row("positive before", before("positive"), ""),
        Row("positive after", after("positive"), "", ">= 0.95"),
        Row("grammatical before", before("grammatical")),
        Row("grammatical after", after("grammatical"), "", ">= 0.85"),
        Row("KL to the SFT policy after", after("kl_nats"), "nats", "<= 12"),
        Row("distinct responses after", after("distinct")),
        Row("reward model: oracle's accuracy minus its own, 5,000 fresh pairs", gaps, "", "<= 0.02"),
        Row("KL coefficient 0: oracle", (hacked.summary["evaluation"]["after"]["oracle"],), "of 4", "hacked"),
        Row("KL coefficient 0: grammatical", (hacked.summary["evaluation"]["after"]["grammatical"],), "", "hacked"),
        Row("KL coefficient 0: KL", (hacked.summary["evaluation"]["after"]["kl_nats"],), "nats", "hacked"),
        Row("whole demo, every stage", tuple(run.wall_s / 60 for run in runs), "min", "<= 6"),
        Row("first PPO step after the stage's start", tuple(r.summary["first_ppo_step_s"] for r in runs), "s", "<= 90"),
        Row("peak memory (PSS)", tuple(r.summary["peak_memory_bytes"] / 2**30 for r in runs), "GiB", "<= 8"),
        Row("largest policy lag", tuple(float(r.summary["policy_lag_max"]) for r in runs), "versions", "<= 1"),
        Row("swaps proved", tuple(float(r.steps[-1]["rollout_actors/num_swaps_proved"]) for r in runs)),
        Row(
            "swaps by checksum only", tuple(float(r.steps[-1]["rollout_actors/num_swaps_checksum_only"]) for r in runs)
        ),
        Row("swaps, prefilling again included, of engine-thread time", _swap_shares(runs), "", "<= 0.03"),
        Row("seconds a PPO step", (statistics.median(_step_times(steps)),), "s"),
    ]


def reviews_dpo(folder: Path) -> list[Row]:
    """Before and after DPO, and after IPO and KTO on the first seed."""
    runs = [train("reviews", folder, f"dpo-{seed}", f"run.seed = {seed}", file="dpo.toml") for seed in SEEDS]
    others = {loss: train("reviews", folder, loss, *lines, file="dpo.toml") for loss, lines in OTHER_LOSSES.items()}

    def evaluated(when: str, metric: str) -> tuple[float, ...]:
        return tuple(run.summary["evaluation"][when][metric] for run in runs)

    rows = [
        Row("oracle before DPO", evaluated("before", "oracle"), "of 4"),
        Row("oracle after DPO", evaluated("after", "oracle"), "of 4"),
        Row("positive before", evaluated("before", "positive")),
        Row("positive after", evaluated("after", "positive")),
        Row("grammatical before", evaluated("before", "grammatical")),
        Row("grammatical after", evaluated("after", "grammatical")),
        Row("KL to the SFT policy after", evaluated("after", "kl_nats"), "nats"),
        Row("distinct responses after", evaluated("after", "distinct")),
        Row("held-out pairs whose better response has the higher reward", _held_out_accuracy(runs)),
    ]
    for loss, run in others.items():
        after = run.summary["evaluation"]["after"]
        rows += [
            Row(f"{loss}: oracle", (after["oracle"],), "of 4"),
            Row(f"{loss}: grammatical", (after["grammatical"],)),
            Row(f"{loss}: KL", (after["kl_nats"],), "nats"),
        ]
    return [*rows, Row("whole run", tuple(run.wall_s / 60 for run in runs), "min")]


def _held_out_accuracy(runs: Sequence[Finished]) -> tuple[float, ...]:
    return tuple(run.summary["dpo"]["held_out_accuracy"] for run in runs)


def _swap_shares(runs: list[Finished]) -> tuple[float, ...]:
    """Of the time of all engine threads, waiting included."""
    keys = ("rollout_actors/swap_s", "rollout_actors/prefill_again_s", "time_s")
    shares = []
    for run in runs:
        swap_s, again_s, elapsed_s = (run.steps[-1][key] - run.steps[0][key] for key in keys)
        shares.append((swap_s + again_s) / (elapsed_s * run.steps[-1]["rollout_actors/num_actors"]))
    return tuple(shares)


def _step_times(steps: list[dict[str, Any]]) -> list[float]:
    pairs = itertools.pairwise(steps)
    return [b["time_s"] - a["time_s"] for a, b in pairs if b["step"] == a["step"] + 1]


def letters(folder: Path) -> list[Row]:
    """Mean reward at fixed numbers of episodes, lag 0 and lag 1, and how many steps got tokens sampled meanwhile."""
    rows = []
    for lag, goals in ((0, {1088: ">= 0.85", 1600: ">= 0.93"}), (1, {1650: ">= 0.85", 2400: ">= 0.93"})):
        lines = (f"trajectory_queue.max_policy_lag = {lag}", "evaluation.every_steps = 1000")
        runs = [train("letters", folder, f"letters-{lag}-{s}", f"run.seed = {s}", *lines) for s in SEEDS]
        for goal, aim in goals.items():
            rows.append(Row(f"lag {lag}: mean reward by episode {goal:,}", rewards_by(runs, goal), "", aim))
        lags = tuple(max(step["cluster/policy_lag_max"] for step in run.steps) for run in runs)
        rows.append(Row(f"lag {lag}: largest lag of a token", lags, "versions", f"<= {lag}"))
        if lag:
            shares = tuple(_share_sampled_meanwhile(run) for run in runs)
            rows.append(Row("lag 1: steps with tokens sampled while a learner step ran", shares, "", ">= 0.5"))
    return rows


def rewards_by(runs: list[Finished], num_episodes: int) -> tuple[float, ...]:
    """The mean reward of the step that ends at that episode (the last one that ends no later)."""
    return tuple(
        [step["learner/reward_mean"] for step in run.steps if step["num_episodes"] <= num_episodes][-1] for run in runs
    )


def _share_sampled_meanwhile(run: Finished) -> float:
    """At lag 1, tokens sampled while step s - 1 ran are trained in step s: its own groups were all there."""
    meanwhile = [step["rollout_actors/num_tokens_sampled_during_step"] > 0 for step in run.steps[:-1]]
    return float(sum(meanwhile) / len(run.steps))
