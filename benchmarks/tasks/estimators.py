"""Letters without a critic: GRPO and RLOO with the settings of the reference curve, four responses to a prompt."""

from __future__ import annotations

from pathlib import Path

from benchmarks.results import Row
from benchmarks.tasks.runs import SEEDS, rewards_by, train

ESTIMATORS = ("grpo", "rloo")
EPISODES = (640, 1_088, 1_600, 2_560)
LINES = (
    "trajectory_queue.groups_per_step = 16",
    "rollout_actors.responses_per_prompt = 4",
    "trajectory_queue.max_policy_lag = 0",
    "evaluation.every_steps = 1000",
)


def measure(folder: Path) -> list[Row]:
    """Mean reward after so many episodes, 64 a step as PPO's, and the KL at the end."""
    rows = []
    for estimator in ESTIMATORS:
        lines = (f'learner.advantages = "{estimator}"', *LINES)
        runs = [train("letters", folder, f"{estimator}-{s}", f"run.seed = {s}", *lines, fresh=False) for s in SEEDS]
        for num in EPISODES:
            rows.append(Row(f"letters, {estimator}: mean reward by episode {num:,}", rewards_by(runs, num)))
        rows.append(
            Row(f"letters, {estimator}: KL at the end", tuple(run.steps[-1]["learner/kl_nats"] for run in runs))
        )
    return rows
