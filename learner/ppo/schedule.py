"""Linear schedules over the steps, and the settings and planned number of steps at each version.

If a run is extended or its settings change, later steps follow the new ones; repeated steps follow the old ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from learner.config import LearnerConfig

Lengths = Sequence[tuple[int, int]]
"""(version, number of steps): the planned number of steps in force after that version."""


def scheduled(value: float, schedule: str, step: int, num_steps: int) -> float:
    """Compute the value at a step; depends on the step number only, so that a resumed run continues it."""
    return value if schedule == "constant" else value * max(0.0, 1 - (step - 1) / num_steps)


def length_at(step: int, lengths: Lengths, otherwise: int) -> int:
    """Return the planned number of steps in force at `step`, or `otherwise` if none was recorded."""
    return max(((version, num) for version, num in lengths if version < step), default=(0, otherwise))[1]


class Phase(NamedTuple):
    """The learner's settings and the sampling temperature in force after a version."""

    version: int
    config: LearnerConfig
    temperature: float


def phase_at(step: int, phases: Sequence[Phase]) -> Phase | None:
    """Return the phase in force at `step`, or None if none was recorded."""
    return max((phase for phase in phases if phase.version < step), key=lambda phase: phase.version, default=None)
