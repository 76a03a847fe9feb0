"""Make and score the questions of reasoning-gym's tasks by name, settings, seed and number.

A question is made again from these four to score a response, so every task works, whatever its metadata are.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS
from reasoning_gym.utils import extract_answer

from cluster.errors import InputError

SIZE = 10**6
"""Questions of a task that can be asked for; they are made one by one."""
Tasks = Sequence[str] | Mapping[str, Mapping[str, Any]]
"""Names of tasks, or the settings of each by its name."""


@dataclass(frozen=True, slots=True)
class Task:
    """A task of reasoning-gym with its settings, as JSON."""

    name: str
    settings: str = "{}"

    def questions(self, seed: int) -> Any:
        """Return the task's questions for a seed. Raises InputError if the package knows no such task or setting."""
        return _questions(self, seed)


@functools.cache
def _questions(task: Task, seed: int) -> Any:
    if task.name not in DATASETS:
        raise InputError(
            "data.settings", f"reasoning-gym has no task {task.name!r}; it has {', '.join(sorted(DATASETS))}"
        )
    try:
        return reasoning_gym.create_dataset(task.name, seed=seed, size=SIZE, **json.loads(task.settings))
    except (TypeError, AssertionError, ValueError) as error:
        raise InputError("data.settings", f"{task.name}: {error}") from error


def tasks_of(tasks: Tasks) -> list[Task]:
    """Return the tasks in the order in which they are named."""
    if isinstance(tasks, Mapping):
        return [Task(name, json.dumps(settings, sort_keys=True)) for name, settings in tasks.items()]
    return [Task(name) for name in tasks]


def score(task: str, settings: str, seed: int, number: int, response: str) -> float:
    """Return the task's own score of a response, from 0 to 1.

    The answer is what stands between `<answer>` and `</answer>`, or else the whole response.
    """
    questions = Task(task, settings).questions(seed)
    answer = extract_answer(response)
    return float(questions.score_answer(response.strip() if answer is None else answer, entry=questions[number]))
