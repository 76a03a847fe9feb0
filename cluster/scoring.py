"""Define the request to a reward service and its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import RewardError


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """One response to score; `columns` are the prompt's other data columns (references, labels).

    In a run of several tasks, `task` selects the scorer.
    """

    id: str
    prompt: str
    response: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    task: str = ""


@dataclass(frozen=True, slots=True)
class Score:
    """A received reward: always finite, with its parts and the version of the scorer."""

    id: str
    reward: float
    parts: Mapping[str, float]
    scorer_version: str


Outcome = Score | RewardError
