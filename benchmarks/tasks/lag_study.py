"""What lag costs: letters at the reference curve's settings, 6,400 episodes, three seeds, for every bound on the lag.

Once with decoupled PPO and once without, where there is a lag. What is compared is the mean reward over the last tenth
of the episodes. A run that is finished in the folder is not done again.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

from benchmarks.results import Row
from benchmarks.tasks.runs import SEEDS, Finished, train

LAGS = (0, 1, 4, 8)
NUM_EPISODES, EPISODES_A_STEP = 6_400, 64
SETTINGS = tuple((lag, decoupled) for lag, decoupled in product(LAGS, (True, False)) if lag or decoupled)
"""Bounds with and without decoupling; without lag the two are one."""
SHOWN = 20
"""Points of a curve."""


def measure(folder: Path) -> list[Row]:
    """The last tenth's reward of every setting, the lag that there really was, and the ratio that has an aim."""
    rows, ends = [], {}
    for lag, decoupled in SETTINGS:
        runs = [_run(folder, lag, decoupled, seed) for seed in SEEDS]
        name = f"lag {lag}, {'decoupled' if decoupled else 'not decoupled'}" if lag else "lag 0"
        ends[lag, decoupled] = ends_of = tuple(_last_tenth(run) for run in runs)
        rows.append(Row(f"{name}: mean reward, last tenth of {NUM_EPISODES:,} episodes", ends_of))
        rows.append(Row(f"{name}: mean policy lag of a token", tuple(_mean_lag(run) for run in runs), "versions"))
        rows += [Row(f"{name}: curve, seed {seed}", _curve(run)) for seed, run in zip(SEEDS, runs, strict=True)]
    ratios = tuple(a / b for a, b in zip(ends[4, True], ends[0, True], strict=True))
    rows.append(Row("lag 4, decoupled: last tenth's mean reward over lag 0's", ratios, "", ">= 0.95"))
    return rows


def _run(folder: Path, lag: int, decoupled: bool, seed: int) -> Finished:
    lines = (
        f"run.seed = {seed}",
        f"trajectory_queue.max_policy_lag = {lag}",
        f"learner.decoupled = {str(decoupled).lower()}",
        f"learner.num_steps = {NUM_EPISODES // EPISODES_A_STEP}",
        "evaluation.every_steps = 1000",
    )
    return train("letters", folder, f"lag-{lag}-{decoupled}-{seed}", *lines, fresh=False)


def _rewards(run: Finished) -> list[float]:
    return [step["learner/reward_mean"] for step in run.steps]


def _last_tenth(run: Finished) -> float:
    rewards = _rewards(run)
    last = rewards[-len(rewards) // 10 :]
    return sum(last) / len(last)


def _mean_lag(run: Finished) -> float:
    return float(sum(step["cluster/policy_lag_mean"] for step in run.steps) / len(run.steps))


def _curve(run: Finished) -> tuple[float, ...]:
    """The mean reward of each twentieth of the episodes."""
    rewards, size = _rewards(run), NUM_EPISODES // EPISODES_A_STEP // SHOWN
    return tuple(sum(rewards[start : start + size]) / size for start in range(0, len(rewards), size))
