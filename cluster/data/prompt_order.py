"""Which prompt comes next: every task's rows in a seeded order of their own, the tasks mixed by their weights.

A function of the seed and of the prompt's number, never of the order of arrival, so that a run goes on with the prompts
that it would have had. Knows neither tickets nor what is done with a prompt.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]


def mixed(weights: Sequence[float]) -> Iterator[int]:
    """Which of several sources is drawn from next, for ever: the one that is furthest behind its share.

    Of several such the first. No source is ever a whole draw ahead of its share, so a stretch of any length has about
    as much of each as the weights say.
    """
    total = sum(weights)
    shares, counts, num = [weight / total for weight in weights], [0] * len(weights), 0
    while True:
        num += 1
        source = max(range(len(shares)), key=lambda place: shares[place] * num - counts[place])
        counts[source] += 1
        yield source


class PromptOrder:
    """Which data row prompt number g is: a seeded permutation of the rows an epoch."""

    def __init__(self, rows: Sequence[Row], seed: int | str) -> None:
        self._rows = rows
        self._seed = seed
        self._epoch = -1
        self._permutation: list[int] = []

    def row(self, group: int) -> Row:
        epoch, place = divmod(group, len(self._rows))
        if epoch != self._epoch:
            self._permutation = list(range(len(self._rows)))
            random.Random(f"prompts:{self._seed}:{epoch}").shuffle(self._permutation)
            self._epoch = epoch
        return self._rows[self._permutation[place]]


class TaskPrompts(NamedTuple):
    """The prompts of one task, and how often they come beside those of the others."""

    task: str
    rows: Sequence[Row]
    weight: float = 1.0


class Prompt(NamedTuple):
    """A data row and the task that it is of."""

    task: str
    row: Row


class MixedPrompts:
    """Which task and which of its rows prompt number g is; ten bytes are kept of every prompt so far."""

    def __init__(self, tasks: Sequence[TaskPrompts], seed: int) -> None:
        self._names = [task.task for task in tasks]
        alone = len(tasks) == 1
        self._orders = [PromptOrder(task.rows, seed if alone else f"{seed}:{task.task}") for task in tasks]
        self._draws = mixed([task.weight for task in tasks])
        self._counts = [0] * len(tasks)
        self._sources, self._places = array("H"), array("Q")

    def prompt(self, group: int) -> Prompt:
        """The prompt of that number."""
        while len(self._places) <= group:
            source = next(self._draws)
            self._sources.append(source)
            self._places.append(self._counts[source])
            self._counts[source] += 1
        source = self._sources[group]
        return Prompt(self._names[source], self._orders[source].row(self._places[group]))
