"""Define the request to a reward service and its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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


def with_trainer_state(request: ScoreRequest, *, global_step: int, max_steps: int) -> ScoreRequest:
    """Return the request with the column `trainer_state`, which functions in TRL's signature get as an object.

    `global_step` is the number of training steps before the one that trains the response.
    """
    state = {"global_step": global_step, "max_steps": max_steps}
    return replace(request, columns={**request.columns, "trainer_state": state})


@dataclass(frozen=True, slots=True)
class Score:
    """A received reward: always finite, with its parts and the version of the scorer."""

    id: str
    reward: float
    parts: Mapping[str, float]
    scorer_version: str


Outcome = Score | RewardError
