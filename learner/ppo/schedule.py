"""Settings that become less from step to step, and how long a run was to be when it did a step.

A run that goes on for longer follows another line from there on; what is trained again follows the line it had.
"""

from __future__ import annotations

from collections.abc import Sequence

Lengths = Sequence[tuple[int, int]]
"""(version, number of steps): what was done after that version was done by a run that was to have so many steps."""


def scheduled(value: float, schedule: str, step: int, num_steps: int) -> float:
    """The value at a step, a function of its number alone, so that a resumed run goes on with it."""
    return value if schedule == "constant" else value * max(0.0, 1 - (step - 1) / num_steps)


def length_at(step: int, lengths: Lengths, otherwise: int) -> int:
    """How many steps the run was to have when it did `step`; `otherwise` where that was not recorded."""
    return max(((version, num) for version, num in lengths if version < step), default=(0, otherwise))[1]
