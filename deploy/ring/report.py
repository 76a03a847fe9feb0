"""What metrics.jsonl tells of each task of a run that has several. Knows nothing of how a step was made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from cluster.trajectory import Trajectory


def task_metrics(
    tasks: Iterable[str], trajectories: Sequence[Trajectory], num_before: Mapping[str, float]
) -> dict[str, float]:
    """A step's figures under `tasks/NAME/...`; of a task that has no trajectory in it only how many it had so far.

    `num_before` are the metrics of the step before.
    """
    metrics: dict[str, float] = {}
    for task in tasks:
        own, key = [trajectory for trajectory in trajectories if trajectory.task == task], f"tasks/{task}"
        metrics[f"{key}/num_episodes"] = num_before.get(f"{key}/num_episodes", 0) + len(own)
        if own:
            metrics[f"{key}/reward_mean"] = fmean(map(_reward, own))
            metrics[f"{key}/response_length_tokens"] = fmean(trajectory.num_response_tokens for trajectory in own)
    return metrics


def _reward(trajectory: Trajectory) -> float:
    """What the scorer and, turn by turn, the environment gave."""
    assert trajectory.reward is not None, "a step is trained on scored trajectories alone"
    return trajectory.reward + sum(turn.reward or 0.0 for turn in trajectory.turns)
