"""Keeps the batch that a learner refused, for whoever wants to know why. Knows nothing of what is wrong with it."""

from __future__ import annotations

from pathlib import Path

from cluster.errors import LearnerError
from cluster.trajectory import write_trajectories
from learner.training_loop import Groups


def keep_batch(run_path: Path, step: int, groups: Groups, error: LearnerError) -> LearnerError:
    """Write a step's trajectories to RUN/failed, those that the error names first; the error with the file's name."""
    path = run_path / "failed" / f"step-{step:06d}.arrow"
    named = set(error.uids)
    trajectories = [trajectory for group in groups for trajectory in group]
    trajectories.sort(key=lambda trajectory: trajectory.uid not in named)
    try:
        write_trajectories(path, trajectories)
        kept = f"antiphon inspect {path}"
    except OSError as failure:
        kept = f"its batch could not be written to {path}: {failure.strerror}"
    return LearnerError(error.where, f"{error.what} ({kept})", uids=error.uids)
