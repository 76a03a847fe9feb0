"""What is asked of a reward service and what it answers. Knows no transport and no scorer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import RewardError


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """One response to score; `columns` are the prompt's other data columns (references, labels).

    In a run of several tasks `task` says which scorer is asked.
    """

    id: str
    prompt: str
    response: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    task: str = ""


@dataclass(frozen=True, slots=True)
class Score:
    """A received reward: always a finite number, with its parts and the version of what gave it."""

    id: str
    reward: float
    parts: Mapping[str, float]
    scorer_version: str


Outcome = Score | RewardError
