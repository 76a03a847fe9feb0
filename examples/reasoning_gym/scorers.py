"""The reward and the metrics of reasoning-gym's questions: the tasks' own scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from examples.reasoning_gym.tasks import score


def reward(
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    task: Sequence[str],
    settings: Sequence[str],
    seed: Sequence[int],
    number: Sequence[int],
) -> list[float]:
    """Return the score of each response, from 0 to 1; many tasks give a part of it to nearly right answers."""
    return [score(*item) for item in zip(task, settings, seed, number, responses, strict=True)]


def evaluate(
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    task: Sequence[str],
    settings: Sequence[str],
    seed: Sequence[int],
    number: Sequence[int],
) -> dict[str, float]:
    """Return the share of right answers, over all questions and by task."""
    scores = reward(prompts, responses, task=task, settings=settings, seed=seed, number=number)
    by_task = defaultdict(list)
    for name, value in zip(task, scores, strict=True):
        by_task[name].append(float(value == 1))
    each = {f"accuracy.{name}": fmean(values) for name, values in by_task.items()} if len(by_task) > 1 else {}
    return {"accuracy": fmean(value == 1 for value in scores), **each}
